"""Loads a diffusers pipeline under a budget and calls it for several prompts at once. The only file of a run that knows a host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overflowml_core.cli.running.prompts import Prompt
from overflowml_core.cli.running.settings import Settings
from overflowml_core.errors import BadLimits, DoesNotFit, NotAModel, OverflowmlError, Unsupported
from overflowml_core.facts import Limits, Workload

if TYPE_CHECKING:
    from overflowml_core.protocols import Attachment

AUTO_BATCHES = (1, 2, 4, 8)
"""Sizes that are planned for where nobody says one."""
_WORTH = 0.97
"""A larger batch is taken where a picture takes at most so much of the time; predictions are not better than that."""


class CallFailed(OverflowmlError):
    """A pipeline that refused its arguments, or gave something else than pictures."""


@dataclass(slots=True)
class Pipeline:
    """A pipeline whose weights are still unread until ``attach``.

    Attributes:
        pipe: of diffusers.
        load: knows where the weights are.
        settings: of the run.
    """

    pipe: Any
    load: Any
    settings: Settings

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse before anything is loaded what the pipeline's call would not take.

        Raises:
            Unsupported: it takes no prompt, or images besides.
            BadLimits: an argument that it does not have.
        """
        name, taken = type(self.pipe).__name__, inspect.signature(type(self.pipe).__call__).parameters
        if "prompt" not in taken:
            raise Unsupported(f"{name}: it takes no prompt, and run makes pictures from prompts alone; call it from Python")
        given = {"prompt", *self.settings.call}
        needed = [one for one, it in taken.items() if it.default is it.empty and it.kind is it.POSITIONAL_OR_KEYWORD and one != "self"]
        for one in needed:
            if one not in given:
                raise Unsupported(f"{name}: it needs {one}, and run makes pictures from prompts alone; call it from Python")
        asked = {**self.settings.call}
        if any(one.negative is not None for one in prompts) or self.settings.negative is not None:
            asked["negative_prompt"] = ""
        if self._size_of(prompts) is not None:
            asked |= {"height": 0, "width": 0}
        for one in asked:
            if one not in taken:
                raise BadLimits(f"{one}: {name} has no such argument; leave it out (it has {', '.join(list(taken)[1:])})")

    def _size_of(self, prompts: Sequence[Prompt]) -> tuple[int | None, int | None] | None:
        sizes = [one for one in map(self._size, prompts) if one != (None, None)]
        return max(sizes, key=lambda size: (size[0] or 0) * (size[1] or 0)) if sizes else None

    def _size(self, prompt: Prompt) -> tuple[int | None, int | None]:
        return prompt.width or self.settings.width, prompt.height or self.settings.height

    def workload(self, prompts: Sequence[Prompt], batch: int) -> Workload:
        """What the plan is made for: so many of the largest pictures that are asked for."""
        width, height = self._size_of(prompts) or (None, None)
        steps = self.settings.call.get("num_inference_steps")
        return Workload(height=height, width=width, steps=steps if isinstance(steps, int) and steps > 0 else None, batch=batch)

    def best_batch(self, prompts: Sequence[Prompt], limits: Limits) -> int:
        """How many prompts at once are predicted to take the least time each, of what fits.

        Where times are unknown, that which moves the fewest weights for a picture.

        Raises:
            DoesNotFit: not even one.
        """
        from overflowml_core import session

        machine, best, least = session.detect(), 1, float("inf")
        for batch in AUTO_BATCHES:
            if batch > max(1, len(prompts)):
                break
            workload = self.workload(prompts, batch)
            try:
                estimate = session.make_plan(session.describe(self.pipe, workload), limits, workload, machine).estimate
            except DoesNotFit:
                if batch == 1:
                    raise
                break
            each = (estimate.streamed_bytes if estimate.total_s is None else estimate.total_s) / batch
            if each < least * _WORTH:
                best, least = batch, each
        return best

    def attach(self, prompts: Sequence[Prompt], batch: int, limits: Limits) -> Attachment:
        """Plan for batches of this size and bring the weights to where the plan has them.

        Raises:
            DoesNotFit: no plan respects the limits.
        """
        from overflowml_core import session

        return session.manage(self.pipe, limits, self.workload(prompts, batch), self.load)

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Any]:
        """Pictures of some prompts of one size, computed at once. Each one's noise comes from its own seed.

        Raises:
            CallFailed: the pipeline refused its arguments, or gave no pictures.
        """
        import torch

        width, height = self._size(prompts[0])
        size = {name: value for name, value in (("width", width), ("height", height)) if value is not None}
        negatives = [one.negative if one.negative is not None else self.settings.negative for one in prompts]
        negative = {"negative_prompt": [text or "" for text in negatives]} if any(text is not None for text in negatives) else {}
        # On the CPU, so that a seed means the same on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        torch.manual_seed(seeds[0])  # for what a pipeline draws without asking its generator
        try:
            made = self.pipe(
                prompt=[one.prompt for one in prompts], generator=generators, output_type="pil", **size, **negative, **self.settings.call
            )
        except (TypeError, ValueError) as error:
            raise CallFailed(f"{type(self.pipe).__name__} refused the call ({error}); change the prompts or the options") from error
        images = getattr(made, "images", None)
        if not isinstance(images, list) or len(images) != len(prompts) or not all(hasattr(image, "save") for image in images):
            found = type(made).__name__ if images is None else f"{type(images).__name__} in place of {len(prompts)} pictures"
            raise CallFailed(f"{type(self.pipe).__name__}: it gave {found}, and run keeps one picture for each prompt; call it from Python")
        return images


def check_folder(folder: Path) -> None:
    """Refuse what is no pipeline's folder.

    Raises:
        NotAModel, BadCheckpoint: it is none, or broken.
        Unsupported: it is a language model or a part of a pipeline.
    """
    from overflowml_core.inspect import kind_of_folder

    kind = kind_of_folder(folder)
    if kind is None:
        raise NotAModel(folder, "run makes pictures: give the folder of a diffusers pipeline, which holds model_index.json")
    if kind != "diffusers-pipeline":
        raise Unsupported(f"{folder}: no diffusers pipeline; run makes pictures alone, so give a folder that holds model_index.json")


def open_pipeline(folder: Path, settings: Settings, limits: Limits) -> Pipeline:
    """Have diffusers make the pipeline and leave its weights unread.

    Raises:
        NotAModel, BadCheckpoint, UnsafeCheckpoint: diffusers cannot load it.
    """
    from overflowml_core import session
    from overflowml_core.cli.question import torch_dtype
    from overflowml_core.loading import Loading, loading

    session.install()
    import diffusers

    from overflowml_diffusers.host import check_pipeline_source

    check_pipeline_source(str(folder), {})
    options = {} if settings.dtype is None else {"torch_dtype": torch_dtype(settings.dtype)}
    load = Loading(limits)
    with loading(load):
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, load, settings)


def in_batches(prompts: Sequence[Prompt], settings: Settings, size: int) -> list[tuple[int, ...]]:
    """Indices of prompts that are run at once: those of one size that stand together, so many at most.

    It depends on nothing but its arguments, so that a run that goes on computes each picture in the same company.
    """
    found: list[list[int]] = []
    last: Mapping[str, Any] | None = None
    for index, one in enumerate(prompts):
        kind = {"width": one.width or settings.width, "height": one.height or settings.height}
        kind["negative"] = one.negative is not None or settings.negative is not None
        if kind != last or len(found[-1]) == size:
            found.append([])
        found[-1].append(index)
        last = kind
    return [tuple(batch) for batch in found]
