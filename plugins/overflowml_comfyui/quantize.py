"""From a plan to a file of quantized weights: which layer gets which format, where the file lies, that it is made once. Knows no host."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overflowml_comfyui.decision import Part
from overflowml_comfyui.formats import ALGORITHMS, HostFormat
from overflowml_comfyui.quantized_file import SCHEMA, Layout, Record, answers, lay_out, now_s, write
from overflowml_comfyui.request import Request
from overflowml_comfyui.source import Layer, Source
from overflowml_core import environment, session
from overflowml_core.errors import DoesNotFit, OverflowmlError, PlanMismatch
from overflowml_core.facts import Limits, Machine, Network, TensorFact, digest
from overflowml_core.formats import AS_STORED, Format
from overflowml_core.inspect.tensor_groups import find_groups
from overflowml_core.layout import align
from overflowml_core.runtime.file_lock import Lock, take
from overflowml_core.units import format_bytes

if TYPE_CHECKING:
    from overflowml_comfyui.encoding import Encoder

_log = logging.getLogger("overflowml")

_LONGEST_STEM_CHARS = 120
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """What shall become of a model's weights.

    Attributes:
        formats: that may be chosen, the most exact first.
        quality: what may be lost, as in ``Limits``.
        is_demanded: weights as they are stored are no answer.
    """

    formats: tuple[Format, ...]
    quality: str
    is_demanded: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A file of quantized weights.

    Attributes:
        path: where it is.
        layout: what it holds.
        is_new: it was made in this run.
    """

    path: Path
    layout: Layout
    is_new: bool


def decide(name: str, network: Network, request: Request, asked: Asked, machine: Machine) -> Part:
    """Plan for a model whose weights may be converted.

    Args:
        name: what people call it.
        network: from :func:`overflowml_comfyui.source.describe`.
        request: budget and sizes.
        asked: formats and quality.
        machine: where it runs.

    Raises:
        DoesNotFit: no plan respects the limits; the message says what would.
    """
    excluded = frozenset({(AS_STORED, "*")}) if asked.is_demanded else frozenset()
    limits = Limits.exactly(request.budget_bytes, None, request.reserve_bytes, quality=asked.quality, excluded=excluded)
    try:
        plan = session.make_plan(network, limits, request.workload, machine, own_formats=asked.formats)
    except DoesNotFit as refusal:
        component = network.components[0].name
        said = str(refusal).removeprefix(f"{component}: ").replace("overflow='", "budget='")
        raise DoesNotFit(f"{name}: {said}", refusal.near_misses) from None
    return Part(name, plan, "", network, request.workload)


def clipped(part: Part, budget_bytes: int | None) -> list[str]:
    """What the plan says of a budget that is more than there is; nothing of one that is not.

    Args:
        part: with its plan.
        budget_bytes: that was asked for.
    """
    if part.plan is None or budget_bytes is None or part.plan.budget.device_bytes >= budget_bytes:
        return []
    return [reason for reason in part.plan.reasons if "asked for" in reason][:1]


def layer_formats(part: Part, layers: Mapping[str, tuple[Layer, ...]], formats: Sequence[Format]) -> dict[str, HostFormat]:
    """The format of each layer that a plan converts, by the layer's name: what the planner counted when it weighed the blocks.

    Args:
        part: with its plan.
        layers: that may be converted, by the name of their block.
        formats: as the planner knew them.
    """
    named = {one.name: one for one in formats}
    return {
        layer.name: ALGORITHMS[placement.format]
        for placement in (part.plan.placements() if part.plan is not None else ())
        if placement.format != AS_STORED
        for layer in layers.get(placement.block, ())
        if named[placement.format].converts(layer.rows, layer.columns, layer.dtype)
    }


def work_out(source: Source, part: Part, formats: Mapping[str, HostFormat], made_by: str) -> Layout:
    """The file that carries a plan out, and that it takes of the device exactly what the plan says.

    Args:
        source: the model's file.
        part: with its plan.
        formats: of the layers that are quantized.
        made_by: what converts the weights, with its version.

    Raises:
        PlanMismatch: a block would take other bytes than the plan has for it.
    """
    assert part.plan is not None
    chosen = sorted((name, one.name) for name, one in formats.items())
    conversion = digest([SCHEMA, source.label, part.network.fingerprint, chosen, made_by])
    layout = lay_out(source, formats, Record(conversion, source.stamp, part.fingerprint, made_by, now_s()))
    facts = [TensorFact(name, entry.shape, entry.dtype, entry.nbytes) for name, entry in source.tensors.items()]
    blocks = {tensor.name: group.name for group in find_groups(facts)[0] for tensor in group.tensors}
    slabs: Counter[str] = Counter()
    for stored, _ in layout.tensors:
        if not stored.mark:
            slabs[blocks.get(f"{stored.layer}.weight" if stored.layer else stored.name, "")] += align(stored.nbytes)
    for placement in part.plan.placements():
        found = slabs[placement.block]
        if found != placement.stored_bytes:
            raise PlanMismatch(
                f"{source.path.name}, {placement.block}: the file would hold {found} bytes and the plan has {placement.stored_bytes}; "
                "tell the authors of overflowml which model it is"
            )
    return layout


def file_name(layout: Layout) -> str:
    """What the file is called: the source, the formats, and the fingerprint of what the plan decided of its weights.

    Budgets and sizes that decide the same of the weights share a file.
    """
    formats = "-".join(sorted({one.name for one in layout.formats.values()}))
    return f"{layout.source.path.stem[:_LONGEST_STEM_CHARS]}-{formats}-{layout.record.conversion}.safetensors"


def obtain_file(layout: Layout, encoders: Mapping[str, Encoder], places: Sequence[Path], progress: Callable[[int, int], None]) -> Made:
    """The file of a layout: the one that is there, or a new one. Where several processes want it, one makes it.

    Args:
        layout: of the file.
        encoders: by the name of the format.
        places: folders where it may lie, the best first.
        progress: told bytes that are done, and all; what it raises ends the work.

    Raises:
        OverflowmlError: it cannot be made; nothing is left behind.
    """
    name = file_name(layout)
    found = _found(layout, name, places, logging.DEBUG)
    if found is not None:
        return Made(found, layout, False)
    with _turn(layout.record.conversion, lambda: progress(0, 1)):
        found = _found(layout, name, places, logging.WARNING)  # another process may have made it meanwhile
        if found is not None:
            return Made(found, layout, False)
        place = _place(layout, places)
        try:
            write(layout, encoders, place / name, progress)
        except OSError as error:
            raise OverflowmlError(
                f"{place}: {name} cannot be written ({error.strerror or error}); "
                f"{format_bytes(layout.file_bytes)} are needed there: free them, or give ComfyUI another folder for diffusion models"
            ) from None
    return Made(place / name, layout, True)


def _found(layout: Layout, name: str, places: Sequence[Path], level: int) -> Path | None:
    for place in places:
        path = place / name
        if not path.is_file():
            continue
        why_not = answers(path, layout.record.conversion, layout.source.stamp)
        if not why_not:
            return path
        _log.log(level, "%s: %s; it is made again", path, why_not)
    return None


def _place(layout: Layout, places: Sequence[Path]) -> Path:
    """The first folder that can be written and has room."""
    reasons = []
    for place in dict.fromkeys(places):
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reasons.append(f"{place} cannot be written")
            continue
        free_bytes = shutil.disk_usage(place).free
        if free_bytes >= layout.file_bytes:
            return place
        reasons.append(f"{place} has {format_bytes(free_bytes)} free")
    told = "; ".join(reasons) or "ComfyUI has no folder for diffusion models"
    raise OverflowmlError(
        f"{layout.source.path.name}: its quantized file takes {format_bytes(layout.file_bytes)}, and there is no place for it ({told}): "
        "free room, or give ComfyUI another folder for diffusion models (extra_model_paths.yaml)"
    )


@contextmanager
def _turn(conversion: str, ask: Callable[[], None]) -> Iterator[None]:
    """Be the only process of this machine that makes a file. Nothing is right or wrong by it: it saves others the work.

    Args:
        conversion: names the file.
        ask: called while another one is at work; what it raises ends the wait.
    """
    try:
        folder = environment.cache_folder() / "comfyui"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{conversion}.turn", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        _log.info("no lock for %s (%s): another process may do the same work", conversion, error)
        yield
        return
    try:
        while take(descriptor) is Lock.BUSY:
            ask()
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def sentences(made: Made) -> list[str]:
    """What the report says of a file: layers, bytes planned and in the file."""
    layout = made.layout
    before = sum(entry.nbytes for entry in layout.source.tensors.values())
    counts: dict[str, int] = {}
    for one in layout.formats.values():
        counts[one.name] = counts.get(one.name, 0) + 1
    told = ", ".join(f"{count} layers in {name}" for name, count in sorted(counts.items()))
    rest = len(layout.source.tensors) - len(layout.formats)
    how = "made in this run" if made.is_new else "loaded from the file that an earlier run made"
    found = made.path.stat().st_size
    return [
        f"{told}, {rest} tensors as they are: weights of {format_bytes(before)} take {format_bytes(layout.weight_bytes)}",
        f"file {made.path.name}: {found} bytes, {layout.file_bytes} planned; {how}",
    ]
