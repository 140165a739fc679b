"""Questions that many tests ask: are two outputs bit-equal, what is the smallest budget, is anything left behind."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import overflowml
from overflowml_core import session
from overflowml_core.facts import Network
from overflowml_core.planner.needs import phase_needs
from overflowml_core.runtime.engine import Engine


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an output of a host, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def assert_same(ours: Any, theirs: Any) -> None:
    """Bit for bit, dtype and shape included; something must be there to compare."""
    left, right = list(tensors_in(ours)), list(tensors_in(theirs))
    assert left, f"no tensor in {type(ours).__name__}"
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert torch.equal(mine.isnan(), other.isnan())
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), f"differs by {(mine.float() - other.float()).abs().max().item():.3g}"


def smallest(source: Path | str | object, **options: Any) -> overflowml.Limits:
    """The smallest budget with which a plan exists, as the refusal of one byte names it; nothing is kept for activations.

    Planned without a profile, which costs seconds: where nothing is kept for activations, needs are those of the weights.
    """
    try:
        session.make_plan(_unprofiled(source, options), overflowml.Limits.exactly(device_memory=1, reserve=0))
    except overflowml.DoesNotFit as refusal:
        return overflowml.Limits.exactly(device_memory=refusal.near_misses[0].needed_bytes, reserve=0)
    raise AssertionError("a model fits in one byte")


def whole_blocks(source: Path | str | object, room_bytes: int = 0, **options: Any) -> overflowml.Limits:
    """The smallest budget that no block is taken apart for, and so much more; nothing is kept for activations."""
    needs = phase_needs(_unprofiled(source, options), overflowml.Limits.exactly(device_memory=1, reserve=0))
    return overflowml.Limits.exactly(device_memory=max(need.smallest_bytes for need in needs) + room_bytes, reserve=0)


def _unprofiled(source: Path | str | object, options: dict[str, Any]) -> Network:
    network = session.plugins().describe(source, overflowml.Workload(), options)
    assert network is not None
    return network


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module, managed: bool = False) -> None:
    """Names, dtypes, values and ties of all parameters and buffers; a managed model takes no gradients, so there they may differ."""
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].device == right[name].device, name
        assert torch.equal(left[name].nan_to_num(), right[name].nan_to_num()), name
    assert _ties(ours) == _ties(theirs)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert managed or mine.requires_grad == other.requires_grad, name
    for (name, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert mine.device == other.device, name
        assert torch.equal(mine, other), name


def _ties(module: torch.nn.Module) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def assert_one_line(error: overflowml.OverflowmlError, *needles: str) -> None:
    """An error for people: one line that holds these words and a way out."""
    text = str(error)
    assert "\n" not in text
    for needle in needles:
        assert needle in text, text
    assert "; " in text, f"no way out: {text}"


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / path.relative_to(source))  # with its time, by which a profile is found again
    return target


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def note_engine(engine: Engine) -> None:
    """Count this engine until it is detached or gone."""
    _ENGINES.add(engine)


def live_engines() -> int:
    """Engines that still hold something after everything unreachable was collected."""
    if any(not engine._detached for engine in _ENGINES):
        gc.collect()
    return sum(1 for engine in _ENGINES if not engine._detached)
