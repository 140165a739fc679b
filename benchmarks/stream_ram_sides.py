"""The sides of the ram part: ways to run a model that waits in RAM on an accelerator. Each gets a shell of its own to work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from stream_subjects import Subject
from torch import nn

import overflowml


@dataclass(frozen=True)
class Room:
    """Where a side runs and what it may take.

    Attributes:
        device: that computes.
        budget_bytes: of the device's memory, everything included.
        reserve_bytes: of them for activations.
    """

    device: torch.device
    budget_bytes: int
    reserve_bytes: int


class Side(Protocol):
    """Readies a model for its calls, and undoes what would outlive the model. Yields the attachment where it has one."""

    def __call__(self, model: nn.Module, subject: Subject, room: Room) -> AbstractContextManager[Any]: ...


@contextmanager
def ours(model: nn.Module, subject: Subject, room: Room) -> Iterator[Any]:
    """overflowml, with torch's allocator capped at the budget."""
    cuda = room.device.type == "cuda"
    if cuda:
        total_bytes = torch.cuda.get_device_properties(room.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(room.budget_bytes / total_bytes, 1.0), room.device)
    try:
        limits = overflowml.Limits.exactly(device_memory=room.budget_bytes, reserve=room.reserve_bytes, quality="lossless")
        yield overflowml.manage(model, limits)
    finally:
        overflowml.release(model)
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, room.device)


@contextmanager
def resident(model: nn.Module, subject: Subject, room: Room) -> Iterator[None]:
    """Everything on the device."""
    model.to(room.device)
    yield


@contextmanager
def sequential(model: nn.Module, subject: Subject, room: Room) -> Iterator[None]:
    """accelerate's sequential offload, module by module."""
    from accelerate import cpu_offload

    cpu_offload(model, room.device, offload_buffers=True)
    yield


@contextmanager
def group_block(model: nn.Module, subject: Subject, room: Room) -> Iterator[None]:
    """diffusers' group offload, one block a group, with streams."""
    _group(model, room.device, offload_type="block_level", num_blocks_per_group=1)
    yield


@contextmanager
def group_leaf(model: nn.Module, subject: Subject, room: Room) -> Iterator[None]:
    """diffusers' group offload, every leaf module by itself, with streams."""
    _group(model, room.device, offload_type="leaf_level")
    yield


def _group(model: nn.Module, device: torch.device, **how: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"), use_stream=True, **how)


@contextmanager
def mmgp(model: nn.Module, subject: Subject, room: Room) -> Iterator[None]:
    """mmgp with pinned memory and asynchronous transfers under the same budget."""
    from mmgp import offload  # type: ignore[import-not-found]

    budget_mib = (room.budget_bytes - room.reserve_bytes) / 2**20
    # A plain number would be ignored: only a mapping of names is read (3.8.2).
    made = offload.all(
        {"transformer": model}, pinnedMemory=True, quantizeTransformer=False, budgets={"transformer": budget_mib}, verboseLevel=0
    )
    try:
        yield
    finally:
        made.release()


FREE: dict[str, Side] = {"sequential": sequential, "group_block": group_block, "group_leaf": group_leaf}
"""These cannot be told a budget (with streams, diffusers takes one block a group whatever it is told): one measurement each."""
STEERED: dict[str, Side] = {"ours": ours, "mmgp": mmgp}
