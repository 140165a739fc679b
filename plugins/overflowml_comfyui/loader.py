"""What the node Load & Quantize does, in order: read a header, plan, make a file where there is none, and have the host load it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overflowml_comfyui import running_host, running_loader
from overflowml_comfyui.decision import Decision, Part
from overflowml_comfyui.formats import FORMATS, HostFormat, planned
from overflowml_comfyui.quantize import Asked, Made, clipped, decide, layer_formats, obtain_file, sentences, work_out
from overflowml_comfyui.request import request_of
from overflowml_comfyui.source import Source, describe, model_of
from overflowml_core.errors import DoesNotFit, OverflowmlError, PlanMismatch, Unsupported

AUTO = "auto"
"""In place of a format: the plan chooses, or leaves weights as they are."""

offered, sources = running_loader.offered, running_loader.sources


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, where its weights came from, and why.

    Attributes:
        model: the host's MODEL.
        path: of the file that it was loaded from.
        decision: the plan.
        sentences: what was done, for the report.
        is_capped: the budget was asked for.
    """

    model: Any
    path: Path
    decision: Decision
    sentences: tuple[str, ...]
    is_capped: bool


def check(label: object) -> None:
    """Look whether a file can be loaded, by its header alone.

    Raises:
        OverflowmlError: it cannot; in one sentence.
    """
    source = running_loader.source_of(str(label))
    model_of(source, running_loader.prefix_of(source))


def stamp_of(label: str) -> str:
    """What changes whenever the file does; empty where there is none."""
    try:
        return str(running_loader.source_of(label).stamp)
    except OverflowmlError:
        return ""


def obtain(label: str, format_name: str | None, quality: str, fields: Mapping[str, object]) -> Loaded:
    """Load the model of a file in the formats of a plan.

    Args:
        label: the file, as :func:`sources` names it.
        format_name: the format that is demanded; None where the plan chooses, or leaves weights as they are.
        quality: what it may lose then.
        fields: budget, reserve and sizes as the node has them.

    Raises:
        OverflowmlError: it cannot be; nothing is left behind.
    """
    request = request_of(fields)
    whole = running_loader.source_of(label)
    source = model_of(whole, running_loader.prefix_of(whole))
    asked = _asked(format_name, quality)
    network, layers = describe(source, running_loader.linear_layers(source), request.workload)
    if format_name is not None and not any(layers.values()):
        raise Unsupported(f"{source.path.name}: none of its layers can be quantized; load it with ComfyUI's own loader")
    part = decide(source.path.name, network, request, asked, running_host.machine())
    is_capped = request.budget_bytes is not None
    limited = clipped(part, request.budget_bytes)
    formats = layer_formats(part, layers, asked.formats)
    if not formats:
        kept = "weights as they are stored: no format of the permitted quality is worth it, or smaller, for this budget"
        return Loaded(running_loader.load_as_stored(source), source.path, Decision((part,)), (kept, *limited), is_capped)
    made = _file(source, part, formats)
    return Loaded(_model(made), made.path, Decision((part,)), (*sentences(made), *limited), is_capped)


def foresee(label: str, fields: Mapping[str, object]) -> Part:
    """The plan for a file before the node runs: by its header alone, every matrix in a block taken for a linear layer. Tries nothing out.

    Args:
        label: the file, as :func:`sources` names it.
        fields: of the node, and sizes.

    Raises:
        OverflowmlError: it cannot be described.
    """
    request = request_of(fields)
    whole = running_loader.source_of(label)
    source = model_of(whole, running_loader.prefix_of(whole))
    matrices = {name.removesuffix(".weight"): entry.shape for name, entry in source.tensors.items() if name.endswith(".weight")}
    network, _ = describe(source, {name: (shape[0], shape[1]) for name, shape in matrices.items() if len(shape) == 2}, request.workload)
    name = str(fields.get("format"))
    asked = _asked(None if name == AUTO else name, str(fields.get("quality")), running_loader.unknown)
    try:
        return decide(source.path.name, network, request, asked, running_host.machine())
    except DoesNotFit as refusal:
        return Part(source.path.name, None, str(refusal), network, request.workload)


def _asked(format_name: str | None, quality: str, absence: Callable[[HostFormat], str] = running_loader.missing) -> Asked:
    names = list(FORMATS) if format_name is None else [format_name]
    absent = {name: absence(FORMATS[name]) for name in names}
    if format_name is not None and absent[format_name]:
        raise Unsupported(absent[format_name])
    machine = running_host.machine()
    usable = tuple(planned(FORMATS[name], machine, running_loader.is_native(FORMATS[name])) for name in names if not absent[name])
    return Asked(usable, usable[0].loss if format_name is not None else quality, format_name is not None)


def _file(source: Source, part: Part, formats: Mapping[str, HostFormat]) -> Made:
    from overflowml_comfyui.encoding import kitchen_version

    layout = work_out(source, part, formats, f"comfy-kitchen {kitchen_version()}")
    encoders = {one.name: running_loader.encoder(one) for one in FORMATS.values() if one in formats.values()}
    return obtain_file(layout, encoders, running_loader.places(source), running_loader.progress())


def _model(made: Made) -> Any:
    """The model of a file, with exactly the layers in formats that the file has: a host that reads them otherwise computes nonsense."""
    model = running_loader.load(made.path)
    wanted = {name: one.algorithm for name, one in made.layout.formats.items()}
    found = running_loader.quantized_layers(model)
    if found != wanted:
        if made.is_new:
            with contextlib.suppress(OSError):
                made.path.unlink()
        raise PlanMismatch(
            f"{made.path.name}: ComfyUI reads {len(found)} quantized layers in it, {len(wanted)} were written; load the file that it "
            "was made from with ComfyUI's own loader, and tell the authors of overflowml which model it is"
        )
    return model
