"""Runs a call once and answers equal ones with what it left behind: outputs of the same shapes in the same storages, and the same peak of
memory. Knows tensors and calls, nothing of pipelines.

A denoising loop calls its transformer with the same shapes fifty times, a decoder its tiles by the hundred: one trace of each is exact
for all of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from overflowml_core.runtime.fake import Call, Tracer

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a part of a storage: the storage's number (its place among the inputs where it is negative), and how it lies in it;
    ``whole`` where it is contiguous from the start."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    whole: bool = False


@dataclass(slots=True)
class Known:
    """A call that was traced.

    Attributes:
        traced: what the tracer saw.
        count: how often it happened.
        peak_bytes: most bytes that were live while it ran, over all times; what lived before each call included.
        arguments: views of what it was given, sizes of their storages in bytes, and the form of both, to call it again with the like.
    """

    traced: Call
    count: int
    peak_bytes: int
    arguments: tuple[list[Any], list[int], TreeSpec] = field(repr=False)
    storages: list[int] = field(default_factory=list, repr=False)
    outputs: list[Any] | None = field(default=None, repr=False)
    output_spec: TreeSpec | None = field(default=None, repr=False)

    @property
    def own_bytes(self) -> int:
        """Most bytes that were live at once in the call, beyond those at its entry."""
        return max(self.traced.activation_bytes - self.traced.entry_bytes, 0)


class Replay:
    """Stands in front of a callable that a tracer watches.

    Args:
        call: traced when it is called with something new.
        tracer: that watches it.
        like: a fake tensor, from which new ones are made.
        complete: given the finished call, what it is with what the tracer did not see of it.

    Attributes:
        known: calls by what they were called with, in the order in which each first happened.
        sibling: the replay of a module of the same code and shapes, whose traces hold for this one too.
    """

    def __init__(
        self, call: Callable[..., Any], tracer: Tracer, like: torch.Tensor, complete: Callable[[Call], Call] | None = None
    ) -> None:
        self._call, self._tracer, self._like, self._complete = call, tracer, like, complete
        self.known: dict[Any, Known] = {}
        self.sibling: Replay | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The callable's output, or tensors like it."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), tuple(_key(leaf) for leaf in leaves))
        found = self.known.get(key)
        if found is None and self.sibling is not None and key in self.sibling.known:
            found = self.known[key] = replace(self.sibling.known[key], count=0, peak_bytes=0)
        if found is not None and found.outputs is not None:
            found.count += 1
            found.peak_bytes = max(found.peak_bytes, self._tracer.live_bytes() + found.own_bytes)
            if found.own_bytes:
                self._like.new_empty(found.own_bytes, dtype=torch.uint8)  # the peak, seen by whoever is traced around this call
            return self._answer(found, leaves, args, kwargs)
        numbers: dict[int, int] = {}
        sizes: list[int] = []
        arguments = ([_view(leaf, numbers, sizes) for leaf in leaves], sizes, spec)
        given = [weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        del leaves  # a callee that replaces what is in a list frees what was there; nothing here may keep it
        return self._trace(key, found, arguments, given, args, kwargs)

    def _trace(self, key: Any, found: Known | None, arguments: Any, given: list[Any], args: Any, kwargs: Any) -> Any:
        before = len(self._tracer.calls)
        output = self._call(*args, **kwargs)
        if len(self._tracer.calls) == before:
            return output  # inside another call of the same component, whose part it is
        call = self._tracer.calls[-1]
        if self._complete is not None:
            call = self._complete(call)
        if found is not None:
            found.count += 1
            found.peak_bytes = max(found.peak_bytes, call.activation_bytes)
            return output
        known = self.known[key] = Known(call, 1, call.activation_bytes, arguments)
        left, left_spec = tree_flatten((output, list(_lists(args, kwargs))))
        if all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in left):
            still_there = [(k, reference()) for k, reference in enumerate(given) if reference is not None]
            numbers = {leaf.untyped_storage()._cdata: -1 - k for k, leaf in still_there if leaf is not None}
            known.outputs, known.output_spec = [_view(leaf, numbers, known.storages) for leaf in left], left_spec
        return output

    def _answer(self, found: Known, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        assert found.outputs is not None
        assert found.output_spec is not None
        # A cache that keeps its size stays as it is: what took its place in the call is part of the call's own peak.
        kept = dict(enumerate(_kept(found, args, kwargs)))
        made = rebuild(found.outputs, found.storages, self._like, leaves, kept)
        output, lists = tree_unflatten(made, found.output_spec)
        for target, contents in zip(_lists(args, kwargs), lists, strict=True):
            target[:] = contents
        return output


def stand_in_front(module: nn.Module, method: str, tracer: Tracer, like: torch.Tensor) -> Replay:
    """Put a replay in front of a method of a module, "forward" included, for as long as the module lives."""
    if method == "forward":
        # What torch asks before its own call, hooks and all: the watching tracer's hooks are behind it.
        replay = Replay(module._call_impl, tracer, like)
        module._compiled_call_impl = replay
    else:
        replay = Replay(getattr(module, method), tracer, like)
        vars(module)[method] = replay
    return replay


def fake_of(module: nn.Module) -> torch.Tensor:
    """A fake tensor of a module to make others from.

    Raises:
        StopIteration: it has no parameter.
    """
    return next(module.parameters())


def rebuild(
    views: list[Any], sizes: list[int], like: torch.Tensor, inputs: list[Any] | None = None, kept: Mapping[int, Any] | None = None
) -> list[Any]:
    """New tensors for views, those of one storage in one storage; whatever is no view stays as it is.

    Args:
        views: of the tensors.
        sizes: bytes of their storages.
        like: a fake tensor.
        inputs: tensors whose storages are named by negative numbers.
        kept: by place in ``views`` tensors to be taken as they are.
    """
    storages: dict[int, torch.Tensor] = {}
    made: list[Any] = []
    for place, view in enumerate(views):
        if not isinstance(view, View):
            made.append(view)
            continue
        if kept and kept.get(place) is not None:
            made.append(kept[place])
            continue
        base = inputs[-1 - view.storage] if view.storage < 0 and inputs is not None else storages.get(view.storage)
        if base is None:
            element_bytes = view.dtype.itemsize
            if view.whole and sizes[view.storage] == math.prod(view.size) * element_bytes:
                storages[view.storage] = like.new_empty(view.size, dtype=view.dtype)
                made.append(storages[view.storage])
                continue
            base = storages[view.storage] = like.new_empty(sizes[view.storage] // element_bytes, dtype=view.dtype)
        if base.dtype != view.dtype:
            base = base.view(view.dtype)
        made.append(base.as_strided(view.size, view.stride, view.offset))
    return made


def _kept(found: Known, args: Any, kwargs: Any) -> Iterator[Any]:
    """By place in the outputs: tensors of the lists that a call was given which are as large as those it leaves there."""
    assert found.outputs is not None
    there = tree_flatten(list(_lists(args, kwargs)))[0]
    first = len(found.outputs) - len(there)
    if first < 0:
        return
    yield from (None for _ in range(first))
    for tensor, view in zip(there, found.outputs[first:], strict=True):
        fits = isinstance(tensor, torch.Tensor) and isinstance(view, View) and tensor.dtype == view.dtype
        same = fits and view.storage >= 0 and (tuple(tensor.shape), tuple(tensor.stride())) == (view.size, view.stride)
        yield tensor if same and tensor.untyped_storage().nbytes() == found.storages[view.storage] else None


def _view(leaf: Any, numbers: dict[int, int], sizes: list[int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    storage = leaf.untyped_storage()
    key = storage._cdata
    if key not in numbers:
        numbers[key] = len(sizes)
        sizes.append(storage.nbytes())
    return View(
        numbers[key],
        tuple(leaf.shape),
        tuple(leaf.stride()),
        int(leaf.storage_offset()),
        leaf.dtype,
        leaf.is_contiguous() and not leaf.storage_offset(),
    )


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)
    return (type(leaf).__name__, repr(leaf)) if isinstance(leaf, _PLAIN) else type(leaf).__name__


def _lists(args: Any, kwargs: Any) -> Iterator[list[Any]]:
    """Lists that were given: callees write caches into them."""
    return (value for value in (*args, *kwargs.values()) if isinstance(value, list))
