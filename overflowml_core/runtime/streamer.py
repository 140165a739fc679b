"""The state machine that keeps the next block on its way while one computes: request, wait, release.

Note [slots and events]. Streamed block k uses slot k mod N, always. ``ready`` of a request is recorded behind the copy
into the slot, and whoever computes waits for it; ``free`` of a slot is recorded behind the computation that read it, and
the next copy into the slot waits for that. Both directions are needed: without the first a block computes with the
previous block's weights, without the second a copy overwrites weights in use. The host waits for neither; it waits only
for the reader thread, where a block comes from disk.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home

_LOOK_AGAIN_S = 0.5
"""A thread that waits for a slot looks this often whether those who use it are still there."""


class _Request:
    """A block on its way into a slot."""

    __slots__ = ("error", "issued", "ready")

    def __init__(self, ready: Any) -> None:
        self.ready = ready
        self.issued = threading.Event()
        self.error: BaseException | None = None


class _Slot:
    """A staging slot: which block it holds or awaits, and who computes with it."""

    __slots__ = ("buffer", "free", "holder", "request", "users")

    def __init__(self, buffer: torch.Tensor, free: Any) -> None:
        self.buffer = buffer
        self.free = free
        self.holder: int | None = None
        self.request: _Request | None = None
        self.users: list[int] = []  # idents of the threads that compute with it


class Streamer:
    """Streams the blocks of one phase through its staging slots, in the order in which they are called.

    The order of the first pass is assumed to be that of the homes; every later pass is predicted by the one before. A block that is
    called out of order is fetched on the spot: slower, and right.
    """

    def __init__(self, device: Device, feeder: Feeder, homes: Sequence[Home], slot_count: int, slot_bytes: int) -> None:
        self.device = device
        self.feeder = feeder
        self.homes = tuple(homes)
        self.slot_count = min(slot_count, len(self.homes))
        self.slot_bytes = slot_bytes
        self.pass_count = 0
        """Passes begun: how often the first block was called."""
        self.streamed_bytes = 0
        self.stall_s = 0.0
        """Seconds in which the host waited for the reader thread."""
        self._slots: list[_Slot] = []
        self._parameters: list[tuple[nn.Parameter, ...]] = []
        self._ready: list[Any] = []
        self._successor = [(k + 1) % len(self.homes) for k in range(len(self.homes))]
        self._previous: int | None = None
        self._condition = threading.Condition()
        self._reader: ThreadPoolExecutor | None = None

    @property
    def is_open(self) -> bool:
        """Whether the slots are allocated."""
        return bool(self._slots)

    def open(self) -> None:
        """Allocate the slots and start the first copies.

        Raises:
            torch.OutOfMemoryError: the device has no room; nothing stays allocated.
        """
        if self.is_open or not self.homes:
            return
        buffers = [self.device.empty(self.slot_bytes) for _ in range(self.slot_count)]
        self._parameters = [home.slab.parameters(buffers[k % self.slot_count]) for k, home in enumerate(self.homes)]
        self._ready = [self.device.new_event() for _ in self.homes]
        self._slots = [_Slot(buffer, self.device.new_event()) for buffer in buffers]
        for slot in self._slots:
            # The allocator may hand out memory that queued work still reads; the first copies wait for that work.
            self.device.record(slot.free)
        if any(home.host is None for home in self.homes):
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="overflowml-reader")
        with self._condition:
            for k in range(self.slot_count):
                self._send(k)

    def close(self) -> None:
        """Free the slots; all blocks are at home afterwards. A second call does nothing."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.shutdown(wait=True, cancel_futures=True)
        if self._slots:
            self.device.synchronize()
        for home in self.homes:
            home.slab.install(home.parameters)
        self._slots, self._parameters, self._ready, self._previous = [], [], [], None

    def wait(self, k: int) -> None:
        """Have block k on the device and installed; called right before it computes.

        Raises:
            ReadFault: its file is gone or shorter than it was. The next call tries again.
            Unsupported: the calling thread is inside another block that uses the same slot.
        """
        me = threading.get_ident()
        with self._condition:
            slot = self._slots[k % self.slot_count]
            if me in slot.users:
                self._take_back(slot, k)
            while slot.users and slot.holder != k:
                if me in slot.users:
                    raise Unsupported(
                        f"block {self.homes[k].slab.unit.name} is called inside {self._name(slot.holder)}, "
                        "which uses the same staging slot; give the budget room for both, so that they stay resident"
                    )
                if not self._condition.wait(_LOOK_AGAIN_S):
                    self._take_back(slot, k)
            request = slot.request
            if slot.holder != k or request is None:
                self._await_issue(request)  # a read under way into this slot ends first
                request = self._send(k)
            slot.users.append(me)
            self.pass_count += k == 0
            self._learn(k)
        try:
            self._await_issue(request)
            if request.error is not None:
                raise request.error
            self.device.wait(request.ready)
            self.homes[k].slab.install(self._parameters[k])
        except BaseException:
            self.release(k, failed=True)
            raise

    def release(self, k: int, failed: bool = False) -> None:
        """Give block k's slot free behind what was computed with it, and start the next copies."""
        me = threading.get_ident()
        with self._condition:
            slot = self._slots[k % self.slot_count] if self._slots else None
            if slot is None or slot.holder != k or me not in slot.users:
                return
            slot.users.remove(me)
            if not slot.users:
                self.device.record(slot.free)
                self.homes[k].slab.install(self.homes[k].parameters)
                if failed:
                    slot.holder, slot.request = None, None
            self._condition.notify_all()
            if not failed:
                self._prefetch(k)

    def begin_pass(self) -> None:
        """Take back what this thread left in use when an interrupt broke off its last pass."""
        me = threading.get_ident()
        with self._condition:
            stale = [slot.holder for slot in self._slots if me in slot.users]
        for k in stale:
            if k is not None:
                self.release(k)

    def _take_back(self, slot: _Slot, k: int) -> None:
        """Before a call of block k, free a slot from calls that ended in what no hook sees: an interrupt, the end of a thread."""
        if slot.holder is None:
            return
        home, me = self.homes[slot.holder], threading.get_ident()
        left: list[int] = []
        for user in set(slot.users):
            inside = _calls_under_way(home.slab.unit.module, user) - (user == me and slot.holder == k)
            left += [user] * min(inside, slot.users.count(user))
        slot.users = left
        if not left:
            self.device.record(slot.free)
            home.slab.install(home.parameters)

    def _name(self, k: int | None) -> str:
        return "another block" if k is None else self.homes[k].slab.unit.name

    def _learn(self, k: int) -> None:
        if self._previous is not None and self._previous != k:
            self._successor[self._previous] = k
        self._previous = k

    def _prefetch(self, k: int) -> None:
        claimed: set[int] = set()
        for _ in range(self.slot_count):
            k = self._successor[k]
            index = k % self.slot_count
            slot = self._slots[index]
            if index in claimed:
                continue
            claimed.add(index)
            if not slot.users and slot.holder != k and (slot.request is None or slot.request.issued.is_set()):
                self._send(k)

    def _send(self, k: int) -> _Request:
        slot = self._slots[k % self.slot_count]
        request = _Request(self._ready[k])
        slot.holder, slot.request = k, request
        home = self.homes[k]
        self.streamed_bytes += home.slab.nbytes
        if home.host is not None or self._reader is None:
            self._carry(home, slot, request)
        else:
            self._reader.submit(self._carry, home, slot, request)
        return request

    def _carry(self, home: Home, slot: _Slot, request: _Request) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.feeder.feed(home, slot.buffer, slot.free, request.ready)
        except BaseException as error:  # noqa: BLE001 -- handed to whoever waits for the block, in its own thread
            request.error = error
        finally:
            request.issued.set()

    def _await_issue(self, request: _Request | None) -> None:
        if request is not None and not request.issued.is_set():
            started = time.perf_counter()
            request.issued.wait()
            self.stall_s += time.perf_counter() - started


def _calls_under_way(module: nn.Module | None, ident: int) -> int:
    """How many calls of a module a thread is inside of."""
    count, frame = 0, sys._current_frames().get(ident)
    while frame is not None:
        # What torch's Module has as __call__; every call goes through it, compiled or not.
        count += frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count
