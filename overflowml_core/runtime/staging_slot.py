"""A place in the staging buffer with what is known of it: what was sent for, what computes with it, how its block looks there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.homes import Home
from overflowml_core.staging import Place

AT_ONCE = threading.Event()
AT_ONCE.set()
"""What a request has that the calling thread carries out itself: nobody sees it before its copy is queued."""


class Request:
    """A block on its way into a slot.

    Attributes:
        issued: set once its copy is queued, or failed.
        error: what failed.
        is_handed_over: the reader thread will carry it out; else whoever waits for it does.
    """

    __slots__ = ("_is_taken", "_lock", "_work", "error", "is_handed_over", "issued")

    def __init__(self, issued: threading.Event, work: Callable[[], None] | None = None) -> None:
        self.issued = issued
        self.error: BaseException | None = None
        self.is_handed_over = False
        self._work = work
        self._is_taken = False
        self._lock = threading.Lock()

    def carry_out(self) -> None:
        """Do the work in the calling thread, unless another one does or did."""
        is_mine = False
        try:
            with self._lock:
                is_mine, self._is_taken = not self._is_taken, True
            if is_mine and self._work is not None:
                self._work()
        except BaseException as error:
            if not is_mine:
                raise
            self.error = error  # raised by whoever waits for the block, in its own thread
        finally:
            if is_mine:
                self._work = None  # which may hold memory
                self.issued.set()


COPIED = Request(AT_ONCE)
"""All of those that went well: nothing of them differs."""


class Slot:
    """A block's place in the staging buffer: how far its copy was sent for, who computes with it, and how the block looks there."""

    __slots__ = ("free", "k", "over", "parameters", "place", "ready", "request", "sent_bytes", "target", "users")

    def __init__(self, k: int, place: Place, target: torch.Tensor, free: Any, ready: Any) -> None:
        self.k = k
        self.place = place
        self.target = target
        self.free = free
        self.ready = ready
        self.sent_bytes = 0
        self.over: list[tuple[Place, Any]] = []  # what it put an end to, and behind what
        self.request: Request | None = None
        self.users: list[int] = []  # idents of the threads that compute with it
        self.parameters: tuple[nn.Parameter, ...] | None = None  # made when the block is called there for the first time


def places_of(home: Home) -> tuple[tuple[dict[str, Any], str, int], ...]:
    """Where the weights of a block are held, each with its number: what ``Slab.install`` walks through, flat: it is done twice a block."""
    weights = enumerate(home.slab.unit.weights)
    return tuple((owner.module._parameters, owner.attribute, number) for number, weight in weights for owner in weight.owners)


def calls_under_way(module: nn.Module | None, ident: int) -> int:
    """How many calls of a module a thread is inside of."""
    count, frame = 0, sys._current_frames().get(ident)
    while frame is not None:
        # What torch's Module has as __call__; every call goes through it, compiled or not.
        count += frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count
