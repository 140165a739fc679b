"""The settings of a virtual accelerator: sizes, rates, strictness and the faults to inject."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

DEVICE_NAME = "vgpu"

HazardMode = Literal["off", "record", "raise"]
FaultKind = Literal["alloc", "copy", "pin"]


class HazardError(RuntimeError):
    """Two uses of the same bytes that nothing puts in order; real hardware would race."""


@dataclass(frozen=True)
class Config:
    """What the simulated machine is like. Times are simulated seconds, sizes bytes.

    Attributes:
        budget_bytes: device memory; one byte more raises torch.OutOfMemoryError.
        pinned_bytes: host memory that can be page-locked, registered or allocated.
        h2d_bytes_per_s: host to device rate.
        d2h_bytes_per_s: device to host rate; the two directions do not share a link.
        flop_per_s: rate of operators whose FLOPs torch can count.
        memory_bytes_per_s: device memory rate; an operator takes the longer of its FLOPs and its bytes.
        launch_s: host time to enqueue one operator or copy.
        poll_s: host time of an event or stream query that answers "not yet"; what lets a polling loop end.
        align_bytes: every device allocation is rounded up to this; 1 makes byte-exact tests easy.
        hazards: what an unordered access does: nothing, an entry in `SimDevice.hazards`, or HazardError as well.
        defer_copies: asynchronous copies happen only when something waits for them; False performs them at once.
    """

    budget_bytes: int = 1 << 30
    pinned_bytes: int = 1 << 40
    h2d_bytes_per_s: float = 25e9
    d2h_bytes_per_s: float = 25e9
    flop_per_s: float = 100e12
    memory_bytes_per_s: float = 1e12
    launch_s: float = 0.0
    poll_s: float = 1e-6
    align_bytes: int = 512
    hazards: HazardMode = "raise"
    defer_copies: bool = True


@dataclass(frozen=True)
class Faults:
    """Which calls fail, counted from 1 from the moment the value is assigned to `SimDevice.faults`.

    Attributes:
        alloc: device allocations that raise torch.OutOfMemoryError; results of operators count too.
        copy: copies over the link, either direction, that raise RuntimeError.
        pin: pinned allocations and registrations that raise RuntimeError.
    """

    alloc: Collection[int] = ()
    copy: Collection[int] = ()
    pin: Collection[int] = ()
