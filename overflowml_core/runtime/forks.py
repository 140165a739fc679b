"""Engines in a process that was forked: the threads that read for them are not there, and what they were at is half done."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from overflowml_core.errors import Unsupported

_told: list[weakref.WeakMethod[Callable[[], None]]] = []


def tell_of_fork(method: Callable[[], None]) -> None:
    """Have a bound method called in every process that is forked from this one, as long as its object lives."""
    if not _told and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_tell)
    _told[:] = [reference for reference in _told if reference() is not None] + [weakref.WeakMethod(method)]


def _tell() -> None:
    for reference in _told:
        method = reference()
        if method is not None:
            method()


def refusal() -> Unsupported:
    """What a forked process gets that uses a managed model of its parent."""
    return Unsupported(
        f"process {os.getpid()} was forked while overflowml managed this model, and has none of the threads that read for it; "
        "load or optimize the model in the process that runs it, or start workers with 'spawn' and load it there"
    )
