"""A place in the staging buffer with what is known of it: what was sent for, what computes with it, how its block looks there."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.jobs import Job
from overflowml_core.staging import Place


class Request(Job):
    """A block on its way into a slot."""

    __slots__ = ()

    @classmethod
    def at_once(cls, error: BaseException | None = None) -> Request:
        """One that the calling thread carried out itself: nobody sees it before its copy is queued, or failed."""
        made = cls(_nothing)
        made.carry_out()
        made.error = error
        return made


def _nothing() -> None:
    """What is left to do of a request that was carried out at once."""


COPIED = Request.at_once()
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
