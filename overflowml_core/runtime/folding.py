"""Adapters that fold themselves into the layer that they wrap and out of it (PEFT's ``merge`` and ``unmerge``, under ``fuse_lora``): each
fold is an edit of that layer. Goes by the methods, not by any library's classes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

_FOLDS = ("merge", "unmerge")
_SIGN = "get_base_layer"

Editing = Callable[[nn.Module], AbstractContextManager[None]]


def follow_folds(editing: Editing) -> tuple[Callable[[nn.Module], None], Callable[[], None]]:
    """Have adapters edit within ``editing``.

    Args:
        editing: a context in which weights of a module are at home and may be changed.

    Returns:
        A function to be told of each module, and one that takes everything back.
    """
    wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def meet(module: nn.Module) -> None:
        if module not in wrapped and all(callable(getattr(module, name, None)) for name in (*_FOLDS, _SIGN)):
            wrapped.add(module)
            for name in _FOLDS:
                vars(module)[name] = _edit(weakref.ref(module), getattr(type(module), name), editing)

    def undo() -> None:
        for module in wrapped:
            for name in _FOLDS:
                vars(module).pop(name, None)

    return meet, undo


def _edit(reference: weakref.ref[nn.Module], method: Callable[..., Any], editing: Editing) -> Callable[..., Any]:
    @functools.wraps(method)
    def fold(*args: Any, **kwargs: Any) -> Any:
        module = reference()
        if module is None:
            return None
        with editing(module):
            return method(module, *args, **kwargs)

    return fold
