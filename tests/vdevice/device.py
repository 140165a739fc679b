"""The one simulated device of the process: byte ledger, faults, clock and hazards; knows sizes, not tensors."""

from __future__ import annotations

import threading
from typing import Literal, Protocol

import torch

from .clock import Clock, Engine, LogEntry
from .config import DEVICE_NAME, Config, FaultKind, Faults
from .hazards import Hazards

_INJECTED = " (injected fault)"


class Others(Protocol):
    """Other programs on the same device; see ``others.py``."""

    def read(self) -> tuple[int, int, int]:
        """Bytes of the device, what this process holds of them, what the others do."""
        ...

    def take(self, side: Literal["ours"], nbytes: int) -> bool:
        """Take all of them, or nothing."""
        ...

    def give(self, side: Literal["ours"], nbytes: int) -> None:
        """Give them back."""
        ...


class SimDevice:
    """What tests look at. All sizes in bytes, all times in simulated seconds.

    Attributes:
        config: the settings of the last `install`.
        allocated_bytes: device memory charged now.
        peak_bytes: the most of it since the last reset.
        allocation_count: device allocations since the last reset; zero-byte ones are not counted.
        pinned_bytes: host memory that is pinned now.
        reserved_bytes: what this process holds of a device that it shares; without others it is what is allocated.
        clock: the time line.
        lock: held by whatever changes the state; one operator runs at a time.
    """

    def __init__(self, config: Config) -> None:
        self.lock = threading.RLock()
        self.config = config
        self.allocated_bytes = 0
        self.pinned_bytes = 0
        self._others: Others | None = None
        self._granule_bytes = 1
        self._reserved_bytes = 0
        self._hazards = Hazards(config.hazards)
        self.clock = Clock(config, self._hazards, self.lock)
        self.reset(config)

    def reset(self, config: Config) -> None:
        """New settings, time zero, empty log, no faults, no others. Live tensors and pinned memory stay and stay charged."""
        with self.lock:
            self._others = None
            self.config = config
            self._hazards = Hazards(config.hazards)
            self.clock.reset(config, self._hazards)
            self.peak_bytes = self.allocated_bytes
            self.allocation_count = 0
            self.faults = Faults()

    # ---- what happened

    @property
    def log(self) -> list[LogEntry]:
        """Everything placed on the time line, in the order in which it was enqueued."""
        return self.clock.log

    @property
    def hazards(self) -> list[str]:
        """Hazards found since the last reset, whether raised or not."""
        return self._hazards.found

    @property
    def hazard_checks(self) -> Hazards:
        return self._hazards

    def elapsed(self) -> float:
        """Seconds until everything enqueued so far is done."""
        return self.clock.elapsed_s()

    def busy(self, engine: Engine) -> float:
        """Seconds of work on "compute", "h2d" or "d2h"."""
        return sum(entry.end_s - entry.start_s for entry in self.log if entry.engine == engine)

    def advance(self, seconds: float) -> None:
        """The calling host thread spends time on something else, a read from disk for instance."""
        self.clock.host_until(self.clock.host_s + seconds)

    def synchronize(self) -> None:
        """The host waits for all streams."""
        with self.lock:
            self.clock.synchronize(*self.clock.streams.values())

    # ---- faults

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        with self.lock:
            self._faults = faults
            self._calls: dict[FaultKind, int] = {"alloc": 0, "copy": 0, "pin": 0}

    def fails_now(self, kind: FaultKind) -> bool:
        """Counts one call and says whether the faults want it to fail."""
        with self.lock:
            self._calls[kind] += 1
            return self._calls[kind] in getattr(self._faults, kind)

    # ---- others on the device

    def share(self, others: Others | None, granule_bytes: int = 512) -> None:
        """From now on other programs hold some of the device; what is allocated here comes out of what they leave.

        As torch's allocator does it, this process takes whole granules and keeps what was freed until it is told to empty its cache. Unlike
        in torch, whatever is kept serves every later allocation: there are no fragments.

        Args:
            others: whom to ask; None ends it. The device has their bytes, whatever the settings say.
            granule_bytes: as the driver hands them out.
        """
        with self.lock:
            if self._others is not None:
                self._others.give("ours", self._reserved_bytes)
            self._others, self._granule_bytes, self._reserved_bytes = others, granule_bytes, 0
            if not self._reserve(self.allocated_bytes):
                self._others = None
                raise ValueError(f"{self.allocated_bytes} bytes are allocated already, and the others leave less")

    @property
    def reserved_bytes(self) -> int:
        return self.allocated_bytes if self._others is None else self._reserved_bytes

    def total_bytes(self) -> int:
        """Of the device."""
        return self.config.budget_bytes if self._others is None else min(self.config.budget_bytes, self._others.read()[0])

    def free_bytes(self) -> int:
        """What nobody holds."""
        if self._others is None:
            return self.config.budget_bytes - self.allocated_bytes
        total, ours, theirs = self._others.read()
        return total - ours - theirs

    def empty_cache(self) -> None:
        """Give back what is kept without being allocated."""
        with self.lock:
            if self._others is not None:
                kept_bytes = self._granules(self.allocated_bytes)
                self._others.give("ours", self._reserved_bytes - kept_bytes)
                self._reserved_bytes = kept_bytes

    def _reserve(self, nbytes: int) -> bool:
        if self._others is None or nbytes <= self._reserved_bytes:
            return True
        wanted_bytes = self._granules(nbytes)
        if not self._others.take("ours", wanted_bytes - self._reserved_bytes):
            return False
        self._reserved_bytes = wanted_bytes
        return True

    def _granules(self, nbytes: int) -> int:
        return -(-nbytes // self._granule_bytes) * self._granule_bytes

    # ---- the ledger

    def charge(self, nbytes: int) -> int:
        """Takes `nbytes`, rounded up, from the budget and returns what was taken.

        Raises:
            torch.OutOfMemoryError: they do not fit, or the faults want this allocation to fail.
        """
        config, align = self.config, self.config.align_bytes
        charged = (nbytes + align - 1) // align * align
        if not charged:
            return 0
        with self.lock:
            injected = self.fails_now("alloc")
            if injected or self.allocated_bytes + charged > config.budget_bytes or not self._reserve(self.allocated_bytes + charged):
                free = self.free_bytes() + self.reserved_bytes - self.allocated_bytes
                raise torch.OutOfMemoryError(
                    f"{DEVICE_NAME} out of memory. Tried to allocate {charged} bytes; {self.allocated_bytes} are "
                    f"allocated of {config.budget_bytes}, {free} are free." + _INJECTED * injected
                )
            self.allocated_bytes += charged
            self.allocation_count += 1
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return charged

    def refund(self, charged: int) -> None:
        with self.lock:
            self.allocated_bytes -= charged

    def charge_pinned(self, nbytes: int) -> None:
        """Takes `nbytes` from what can be pinned.

        Raises:
            RuntimeError: they do not fit, or the faults want this pin to fail.
        """
        with self.lock:
            injected = self.fails_now("pin")
            if injected or self.pinned_bytes + nbytes > self.config.pinned_bytes:
                raise accelerator_error(
                    f"{DEVICE_NAME} error: out of memory. Tried to pin {nbytes} bytes of host memory; "
                    f"{self.pinned_bytes} are pinned of {self.config.pinned_bytes}." + _INJECTED * injected
                )
            self.pinned_bytes += nbytes

    def refund_pinned(self, nbytes: int) -> None:
        with self.lock:
            self.pinned_bytes -= nbytes


def accelerator_error(message: str) -> RuntimeError:
    """The error CUDA calls raise: torch.AcceleratorError where this torch has it, a RuntimeError in any case."""
    return getattr(torch, "AcceleratorError", RuntimeError)(message)


DEVICE = SimDevice(Config())
