"""Pictures of ``overflowml run`` by a cluster: the same manifest, seeds and files as of a single process."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overflowml_core.batches import is_out_of_memory
from overflowml_core.cli.running.folder import Header, OtherRun, RunFolder, png_of
from overflowml_core.cli.running.pipeline import CallFailed, Pipeline, in_batches, open_pipeline
from overflowml_core.cli.running.runner import Done, Job, Tell, _differences, seeds_of
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Bytes, Limits
from overflowml_ray.crew import Crew, Summary
from overflowml_ray.errors import SetAside, WorkRefused
from overflowml_ray.models import Library, Listing, on_this_node
from overflowml_ray.nodes import Seat, at_node
from overflowml_ray.storage import Storage, StorageRun

_SEEDS = 2**32
_SHARE = 0.9
"""Of a node's free RAM, which its workers divide among themselves."""


@dataclass(frozen=True, slots=True)
class Made:
    """A picture that a worker made: its file, or the digest and size of what it put into a storage."""

    content: bytes | None
    sha256: str
    nbytes: int
    batch: tuple[int, ...]


class Encoded:
    """A file that is there already, as ``RunFolder.keep`` takes pictures."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def save(self, stream: Any, **how: object) -> None:
        """Write it."""
        stream.write(self.content)


@dataclass
class PictureWork:
    """What each worker loads and does.

    Attributes:
        job: of the command line.
        header: of the run.
        files: of the pipeline on the driver's machine.
        library: Ray's handle of what serves them.
        storage: where workers put pictures; None where they are sent to the driver.
    """

    job: Job
    header: Header
    files: Listing
    library: Any
    storage: Storage | None
    total_s: float | None = None

    def open(self, seat: Seat) -> OpenPictures:
        """Plan for this node's hardware and load."""
        from overflowml_core.environment import cache_folder

        _check_accelerator(seat)
        folder = on_this_node(self.job.pipeline, self.files, cache_folder(), self._read)
        limits = _shared(self.job.limits, seat)
        try:
            opened = open_pipeline(folder, self.job.settings, limits)
            attached = opened.attach(self.job.prompts, self.header.batch, limits)
        except OverflowmlError as error:  # another node may have more memory, or whole files
            raise SetAside(str(error)) from error
        self.total_s = attached.plan.estimate.total_s
        return OpenPictures(self, opened, seeds_of(self.job.prompts, self.header.seed))

    def unit_s(self) -> float | None:
        """Predicted seconds of a picture."""
        return None if not self.total_s else self.total_s / self.header.batch

    def _read(self, name: str, first: int, count: int) -> bytes:
        import ray

        content: bytes = ray.get(self.library.read.remote(name, first, count))
        return content


@dataclass
class OpenPictures:
    """A pipeline at a worker."""

    work: PictureWork
    opened: Pipeline
    seeds: Sequence[int]

    def do(self, task: tuple[tuple[int, ...], frozenset[int]]) -> dict[int, Made]:
        """Make the pictures of a company.

        Args:
            task: who is computed at once, and of them those that are there already.
        """
        company, there = task
        try:
            return self._draw(company, there)
        except CallFailed as error:
            raise WorkRefused(str(error)) from error

    def _draw(self, company: tuple[int, ...], there: frozenset[int]) -> dict[int, Made]:
        if there.issuperset(company):
            return {}
        prompts = self.work.job.prompts
        try:
            images = self.opened.draw([prompts[index] for index in company], [self.seeds[index] for index in company])
        except (MemoryError, RuntimeError) as error:
            if len(company) == 1 or not is_out_of_memory(error):
                raise
            images = None
        if images is None:  # outside of the handler, whose error holds what was computed
            half = len(company) // 2
            return {**self._draw(company[:half], there), **self._draw(company[half:], there)}
        return {index: self._kept(index, image, company) for index, image in zip(company, images, strict=True) if index not in there}

    def _kept(self, index: int, image: Any, company: tuple[int, ...]) -> Made:
        content = png_of(image, {"run": self.work.header.run, "image": index, "seed": self.seeds[index]})
        storage = self.work.storage
        if storage is None:
            return Made(content, "", len(content), company)
        try:
            content = storage.put_new(storage.name_of(index), content)
        except (OSError, ImportError) as error:
            reason = f"{storage.url} cannot be written from there ({getattr(error, 'strerror', None) or error})"
            raise SetAside(reason, whole_node=True) from error
        return Made(None, hashlib.sha256(content).hexdigest(), len(content), company)


def run_on_cluster(ray: Any, job: Job, folder: RunFolder | StorageRun, tell: Tell, note: Callable[[str], None]) -> tuple[Done, Summary]:
    """Make what is missing, as ``run_job`` does in one process.

    Args:
        ray: the module, connected.
        job: what to do. Without a batch it is 1, so that a picture depends on nothing but its own prompt and seed, whoever makes it.
        folder: keeps what is done.
        tell: told how far it is.
        note: told what happens to workers.

    Raises:
        OtherRun: the folder holds pictures of something else.
        OverflowmlError: what is left cannot be made.
    """
    start_s = time.perf_counter()
    header = folder.header
    differences = [] if header is None else _differences(job, header)
    if differences and not folder.is_empty:
        raise OtherRun(Path(folder.path), differences)
    if header is None or differences:
        open_pipeline(job.pipeline, job.settings, job.limits).check(job.prompts)
        seed = secrets.randbelow(_SEEDS) if job.seed is None else job.seed
        header = Header(job.settings.document(), _digest(job), len(job.prompts), seed, job.batch or 1)
        folder.begin(header)
    seeds = seeds_of(job.prompts, header.seed)
    folder.adopt(seeds)
    found = len(folder.done)
    tell(found, header.count, "")
    summary = Summary()
    if found < header.count:
        summary = _make(ray, job, header, folder, tell, note)
    if isinstance(folder, StorageRun):
        folder.put_manifest()
    return Done(header.count - found, found, header.seed, header.batch, time.perf_counter() - start_s), summary


def _make(ray: Any, job: Job, header: Header, folder: RunFolder | StorageRun, tell: Tell, note: Callable[[str], None]) -> Summary:
    seeds = seeds_of(job.prompts, header.seed)
    there = frozenset(folder.done)
    companies = [one for one in in_batches(job.prompts, job.settings, header.batch) if not there.issuperset(one)]
    library = (
        ray.remote(Library)
        .options(num_cpus=0, scheduling_strategy=at_node(ray.get_runtime_context().get_node_id()))
        .remote(job.pipeline.resolve())
    )
    storage = folder.storage if isinstance(folder, StorageRun) else None
    job = replace(job, pipeline=job.pipeline.resolve())
    work = PictureWork(job, header, Listing.of(job.pipeline), library, storage)
    crew = Crew(ray, work, [(one, there.intersection(one)) for one in companies], lambda task: f"picture {companies[task][0]}", note)

    def keep(task: int, made: Mapping[int, Made]) -> None:
        if isinstance(folder, StorageRun):
            for index, one in made.items():
                folder.note(index, one.sha256, one.nbytes, seeds[index], one.batch)
        else:
            for batch in dict.fromkeys(one.batch for one in made.values()):
                images = {index: Encoded(one.content or b"") for index, one in made.items() if one.batch == batch}
                folder.keep(images, {index: seeds[index] for index in images}, batch)
        tell(len(folder.done), header.count, f"{crew.working} worker{'' if crew.working == 1 else 's'}")

    try:
        return crew.run([_cost(job, one) for one in companies], keep)
    finally:
        ray.kill(library)
        if isinstance(folder, StorageRun):
            folder.put_manifest()


def _cost(job: Job, company: tuple[int, ...]) -> float:
    """Of a company, in pictures of the size that the command line names, or of 2**20 pixels."""
    whole = (job.settings.width or 1024) * (job.settings.height or 1024)
    first = job.prompts[company[0]]
    pixels = (first.width or job.settings.width or 1024) * (first.height or job.settings.height or 1024)
    return len(company) * pixels / whole


def _digest(job: Job) -> str:
    from overflowml_core.cli.running.prompts import digest_of

    return digest_of(job.prompts)


def _check_accelerator(seat: Seat) -> None:
    from overflowml_core import session

    if seat.accelerators and not session.detect().accelerators:
        raise SetAside("Ray counts an accelerator there, and torch sees none")


def _shared(limits: Limits, seat: Seat) -> Limits:
    """The limits of one of several workers of a node: the RAM that the user leaves open is divided."""
    if limits.host_memory is not None or seat.on_node == 1:
        return limits
    import psutil

    return replace(limits, host_memory=Bytes(int(psutil.virtual_memory().available * _SHARE / seat.on_node)))
