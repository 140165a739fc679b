"""From traces to the planner's profiles, and from a trace's operations to ones that can be run and timed. Knows no host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from overflowml_core.runtime.fake import Call
from overflowml_core.runtime.probe_works import ATTENTION, GROUPED, RMS_NORM, Recipe, TensorSpec
from overflowml_core.work import PassProfile

__all__ = ["TRACED", "guess_note", "held_bytes", "pass_profile", "peak_of", "run_recipe"]

TRACED = "traced"
"""``PassProfile.source`` of what was run on fake tensors."""


def pass_profile(call: Call, name: str, count: int, cache_bytes: int = 0, note: str = "") -> PassProfile:
    """A traced call as a kind of pass.

    Args:
        call: the trace.
        name: "encode", "denoise", "decode", "prefill" or "token".
        count: how often it happens per unit of work.
        cache_bytes: bytes of caches that outlive the pass; they are among the call's activations.
        note: what people should know; values that had to be guessed are added.
    """
    remarks = [text for text in (note, guess_note(call.guesses)) if text]
    return PassProfile(name, count, call.activation_bytes, call.blocks, call.outside, cache_bytes, TRACED, "; ".join(remarks))


def guess_note(guesses: int) -> str:
    """What a profile says of values that code read and that a trace does not have; empty where there were none."""
    if not guesses:
        return ""
    return "1 value that the code reads was taken as zero" if guesses == 1 else f"{guesses} values that the code reads were taken as zero"


def peak_of(profiles: Iterable[PassProfile]) -> int:
    """Most bytes of activations over all passes; 0 for none."""
    return max((profile.activation_bytes for profile in profiles), default=0)


def held_bytes(holder: object) -> int:
    """Bytes of all storages that an object holds on to, through containers and attributes: what a cache occupies.

    A view holds all of its storage.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending: list[object] = [holder]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, torch.nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend(item)
        else:
            pending.extend(getattr(item, "__dict__", {}).values())
    return sum(storages.values())


def run_recipe(recipe: Recipe, device: torch.device | str) -> Callable[[], object]:
    """An operation of a trace with random data on a device: call the result to run it once.

    Args:
        recipe: of ``Tracer.recipes``.
        device: where its tensors are made; they take as many bytes as they did in the model.
    """
    place = torch.device(device)
    args = [_real(value, place) for value in recipe.args]
    kwargs = {name: _real(value, place) for name, value in recipe.kwargs}
    if recipe.operation == ATTENTION:
        return lambda: torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    if recipe.operation == RMS_NORM:
        return lambda: torch.nn.functional.rms_norm(*args)
    if recipe.operation == GROUPED:
        _spread_rows(args, kwargs)
        grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        return lambda: grouped(*args, **kwargs)
    return lambda: recipe.operation(*args, **kwargs)


def _real(value: Any, device: torch.device) -> Any:
    if isinstance(value, TensorSpec):
        return _random(value, device)
    if isinstance(value, tuple):
        return [_real(item, device) for item in value]
    return device if isinstance(value, torch.device) else value


def _random(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    tensor = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device)
    # Whole numbers are indices almost everywhere, and zero is a valid one; data of zeros only would let some processors run faster.
    if not spec.dtype.is_floating_point or spec.dtype.itemsize == 1:
        return tensor.zero_()
    # In place and element by element of the storage: an expanded dimension cannot be written into.
    flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    flat.normal_()
    return tensor


def _spread_rows(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Give every expert its share of the rows: offsets of zero would give all experts none."""
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if offsets is not None and offsets.numel():
        rows, experts = args[0].shape[0], offsets.numel()
        offsets.copy_(torch.tensor([(expert + 1) * rows // experts for expert in range(experts)]))
