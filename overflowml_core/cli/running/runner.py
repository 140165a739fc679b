"""Makes the pictures of a run that are not there yet, batch by batch. Loads nothing where nothing is left to do."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overflowml_core.batches import BatchSizer, is_out_of_memory
from overflowml_core.batches.batch import batches
from overflowml_core.cli.running.folder import Header, OtherRun, RunFolder
from overflowml_core.cli.running.pipeline import Pipeline, in_batches, open_pipeline
from overflowml_core.cli.running.prompts import Prompt, digest_of
from overflowml_core.cli.running.settings import Settings
from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits
from overflowml_core.guard import MemoryGuard

_SEEDS = 2**32
"""Seeds that are chosen where nobody gives one are below this, so that people can write them down."""
_SEED_RANGE = 2**63

Tell = Callable[[int, int, str], None]
"""Called with pictures that are there, and in all, and with what happened when memory ran out; empty where it did not."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done.

    Attributes:
        pipeline: its folder.
        prompts: in the order of the pictures.
        settings: all else that decides what they look like.
        limits: the budget.
        seed: of the first picture; each has the next one. None chooses it, or takes that of the run that goes on.
        batch: prompts at once. None finds it, or takes that of the run that goes on.
    """

    pipeline: Path
    prompts: tuple[Prompt, ...]
    settings: Settings
    limits: Limits
    seed: int | None = None
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended: pictures made now and found there, its seed and batch, and seconds."""

    made: int
    found: int
    seed: int
    batch: int
    seconds: float


def run_job(job: Job, folder: RunFolder, tell: Tell) -> Done:
    """Make what is missing.

    Args:
        job: what to do.
        folder: open; keeps what is done.
        tell: told how far it is.

    Raises:
        OtherRun: the folder holds pictures of something else.
        OverflowmlError: the pipeline cannot be loaded, or a single picture does not fit.
    """
    start_s = time.perf_counter()
    opened: Pipeline | None = None
    header = folder.header
    differences = [] if header is None else _differences(job, header)
    if differences and not folder.is_empty:
        raise OtherRun(folder.path, differences)
    if header is None or differences:
        opened = _opened(job)
        batch = job.batch or opened.best_batch(job.prompts, job.limits)
        seed = secrets.randbelow(_SEEDS) if job.seed is None else job.seed
        header = Header(job.settings.document(), digest_of(job.prompts), len(job.prompts), seed, batch)
        folder.begin(header)
    seeds = seeds_of(job.prompts, header.seed)
    folder.adopt(seeds)
    found = len(folder.done)
    tell(found, header.count, "")
    if found < header.count:
        _draw_all(job, opened or _opened(job), folder, header, tell)
    return Done(header.count - found, found, header.seed, header.batch, time.perf_counter() - start_s)


def seeds_of(prompts: Sequence[Prompt], first: int) -> list[int]:
    """The seed of each picture: its own, or that of the run and its place."""
    return [(first + index) % _SEED_RANGE if one.seed is None else one.seed for index, one in enumerate(prompts)]


def _opened(job: Job) -> Pipeline:
    opened = open_pipeline(job.pipeline, job.settings, job.limits)
    opened.check(job.prompts)
    return opened


def _differences(job: Job, header: Header) -> list[str]:
    now: dict[str, Any] = {**job.settings.document(), "prompts": digest_of(job.prompts)[:16], "seed": job.seed, "batch": job.batch}
    then: dict[str, Any] = {**header.settings, "prompts": header.prompts_sha256[:16], "seed": header.seed, "batch": header.batch}
    open_now = {name for name in ("seed", "batch") if now[name] is None}
    names = sorted({*now, *then} - open_now)
    return [f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names if now.get(name) != then.get(name)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _draw_all(job: Job, opened: Pipeline, folder: RunFolder, header: Header, tell: Tell) -> None:
    events = getattr(opened.attach(job.prompts, header.batch, job.limits), "events", None)
    seeds, guard = seeds_of(job.prompts, header.seed), MemoryGuard()
    sizer = BatchSizer(header.batch, header.batch)
    for company in in_batches(job.prompts, job.settings, header.batch):
        if folder.done.issuperset(company):
            continue
        # Those that are there are computed once more with the others: the bits of a picture may depend on its company.
        for batch in batches(company, sizer, guard=guard):
            if folder.done.issuperset(batch):
                continue
            try:
                with batch:
                    images = opened.draw([job.prompts[index] for index in batch], [seeds[index] for index in batch])
                    missing = {index: image for index, image in zip(batch, images, strict=True) if index not in folder.done}
                    folder.keep(missing, {index: seeds[index] for index in missing}, tuple(batch))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                line = str(error).strip().partition("\n")[0]
                raise DoesNotFit(
                    f"picture {batch[0]}: memory ran out while it was computed alone ({line}); give a smaller --budget, "
                    "which leaves more of the memory to it, or a smaller size"
                ) from error
            tell(len(folder.done), header.count, "" if events is None else events.counted())
