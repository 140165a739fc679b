"""The state machine that keeps the next block on its way while one computes: request, wait, release.

Note [slots and events]. A block comes into the slot behind that of the block before it, round and round, so that neighbours
never share one, not even the last of a pass and the first of the next. ``ready`` of a slot is recorded behind the copy into
it, and whoever computes waits for it; ``free`` of a slot is recorded behind the computation that read it, and the next copy
into the slot waits for that. Both directions are needed: without the first a block computes with the previous block's
weights, without the second a copy overwrites weights in use. The host waits for neither; it waits only for the reader
thread, where a block comes from disk.
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
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home

_LOOK_AGAIN_S = 0.5
"""A thread that waits for a slot looks this often whether those who use it are still there."""


_AT_ONCE = threading.Event()
_AT_ONCE.set()
"""What a request has that the calling thread carries out itself: nobody sees it before its copy is queued."""


class _Request:
    """A block on its way into a slot."""

    __slots__ = ("error", "issued")

    def __init__(self, issued: threading.Event) -> None:
        self.issued = issued
        self.error: BaseException | None = None


class _Slot:
    """A staging slot: which block it holds or awaits, who computes with it, and how each block looks in it."""

    __slots__ = ("buffer", "free", "holder", "index", "parameters", "ready", "request", "targets", "users")

    def __init__(self, index: int, buffer: torch.Tensor, free: Any, ready: Any) -> None:
        self.index = index
        self.buffer = buffer
        self.free = free
        self.ready = ready
        self.holder: int | None = None
        self.request: _Request | None = None
        self.users: list[int] = []  # idents of the threads that compute with it
        self.parameters: dict[int, tuple[nn.Parameter, ...]] = {}  # by block, made when it is there for the first time
        self.targets: dict[int, torch.Tensor] = {}  # by block, the bytes that a copy from RAM fills


class Streamer:
    """Streams the blocks of one phase through its staging slots, in the order in which they are called.

    The order of the first pass is assumed to be that of the homes; every later pass is predicted by the one before. A block that is
    called out of order is fetched on the spot: slower, and right.
    """

    def __init__(
        self, device: Device, feeder: Feeder, homes: Sequence[Home], slot_count: int, slot_bytes: int, spare_bytes: int = 0
    ) -> None:
        """Plan the slots; :meth:`open` takes them.

        Args:
            device: what computes.
            feeder: brings blocks into slots.
            homes: of the streamed blocks, in the order of the first pass.
            slot_count: staging slots.
            slot_bytes: of each.
            spare_bytes: of the budget, which slots in RAM may take in addition so that files can be read straight into them.
        """
        self.device = device
        self.feeder = feeder
        self.homes = tuple(homes)
        self.slot_count = min(slot_count, len(self.homes))
        self.slot_bytes = slot_bytes
        self.spare_bytes = spare_bytes
        self.pass_count = 0
        """Passes begun: how often the first block was called."""
        self.streamed_bytes = 0
        self.stall_s = 0.0
        """Seconds in which the host waited for the reader thread."""
        self._slots: list[_Slot] = []
        self._staged: list[Home] = []
        self._held: list[_Slot | None] = [None] * len(self.homes)
        """Per block, the slot that holds or awaits it."""
        self._last = 0
        """Slot of the block that was called last."""
        self._places = [_places_of(home) for home in self.homes]
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
        slot_bytes = self.feeder.slot_bytes(self.homes, self.slot_bytes, self.spare_bytes // self.slot_count)
        buffers = [self.device.slot(slot_bytes) for _ in range(self.slot_count)]
        self._staged = [self.feeder.staged(home, slot_bytes) for home in self.homes]
        self._places = [_places_of(home) for home in self.homes]  # weights may have been let go since the last time
        self._slots = [_Slot(i, buffer, self.device.new_event(), self.device.new_event()) for i, buffer in enumerate(buffers)]
        for slot in self._slots:
            # The allocator may hand out memory that queued work still reads; the first copies wait for that work.
            self.device.record(slot.free)
        if any(self._needs_reader(home) for home in self.homes):
            # In RAM the next block's reads stand in line behind the present one's, so that the disk never pauses; a ring serves one
            # after the other.
            count = self.slot_count if self.device.on_host else 1
            self._reader = ThreadPoolExecutor(max_workers=count, thread_name_prefix="overflowml-reader")
        with self._condition:
            self._last = self.slot_count - 1
            for k, slot in enumerate(self._slots):
                self._send(k, slot)

    def close(self) -> None:
        """Free the slots; all blocks are at home afterwards. A second call does nothing."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.shutdown(wait=True, cancel_futures=True)
        if self._slots:
            self.device.synchronize()
        for home in self.homes:
            home.slab.install(home.parameters)
        self._slots, self._staged, self._held, self._previous = [], [], [None] * len(self.homes), None

    def wait(self, k: int) -> None:
        """Have block k on the device and installed; called right before it computes.

        Raises:
            ReadFault: its file is gone or shorter than it was. The next call tries again.
            Unsupported: the calling thread is inside another block that uses the same slot.
        """
        me = threading.get_ident()
        with self._condition:
            slot = self._held[k]
            if slot is None or me in slot.users:
                slot = self._slot_for(k, me)
            request = slot.request
            if slot.holder != k or request is None:
                self._await_issue(request)  # a read under way into this slot ends first
                request = self._send(k, slot)
            slot.users.append(me)
            self._last = slot.index
            self.pass_count += k == 0
            self._learn(k)
        try:
            self._await_issue(request)
            if request.error is not None:
                raise request.error
            self.device.wait(slot.ready)
            parameters = slot.parameters.get(k)
            if parameters is None:
                parameters = slot.parameters[k] = self._staged[k].slab.parameters(slot.buffer)
            self._install(k, parameters)
        except BaseException:
            self.release(k, failed=True)
            raise

    def _slot_for(self, k: int, me: int) -> _Slot:
        """The slot that holds block k, or one for it: behind that of the block called last, the first that nobody computes with."""
        while True:
            held = self._held[k]
            if held is not None:
                if me in held.users:
                    self._take_back(held, k)
                return held
            order = [self._slots[(self._last + step) % self.slot_count] for step in range(1, self.slot_count + 1)]
            for slot in order:
                if me in slot.users:
                    self._take_back(slot, k)
                if not slot.users:
                    return slot
            if all(me in slot.users for slot in order):
                raise Unsupported(
                    f"block {self.homes[k].slab.unit.name} is called inside {self._name(order[0].holder)}, "
                    "which uses the same staging slot; give the budget room for both, so that they stay resident"
                )
            if not self._condition.wait(_LOOK_AGAIN_S):
                for slot in order:
                    self._take_back(slot, k)

    def release(self, k: int, failed: bool = False) -> None:
        """Give block k's slot free behind what was computed with it, and start the next copies."""
        me = threading.get_ident()
        with self._condition:
            slot = self._held[k]
            if slot is None or me not in slot.users:
                return
            slot.users.remove(me)
            if not slot.users:
                self.device.record(slot.free)
                self._install(k, self.homes[k].parameters)
                if failed:
                    slot.holder, slot.request, self._held[k] = None, None, None
            self._condition.notify_all()
            if not failed:
                self._prefetch(k, slot.index)

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
            self._install(slot.holder, home.parameters)

    def _install(self, k: int, parameters: tuple[nn.Parameter, ...]) -> None:
        for place, attribute, number in self._places[k]:
            place[attribute] = parameters[number]

    def _name(self, k: int | None) -> str:
        return "another block" if k is None else self.homes[k].slab.unit.name

    def _learn(self, k: int) -> None:
        if self._previous is not None and self._previous != k:
            self._successor[self._previous] = k
        self._previous = k

    def _prefetch(self, k: int, index: int) -> None:
        """Behind block k in a slot, have its successors in the slots behind it."""
        claimed: list[_Slot] = []
        for step in range(1, self.slot_count + 1):
            k = self._successor[k]
            held = self._held[k]
            slot = self._slots[(index + step) % self.slot_count] if held is None else held
            if slot in claimed:
                continue
            claimed.append(slot)
            if held is None and not slot.users and (slot.request is None or slot.request.issued.is_set()):
                self._send(k, slot)

    def _send(self, k: int, slot: _Slot) -> _Request:
        home = self._staged[k]
        reader = self._reader if self._needs_reader(home) else None
        request = _Request(_AT_ONCE if reader is None else threading.Event())
        if slot.holder is not None:
            self._held[slot.holder] = None
        slot.holder, slot.request, self._held[k] = k, request, slot
        self.streamed_bytes += home.slab.nbytes
        if reader is not None:
            reader.submit(self._read, home, slot, request)
        elif home.host is not None:
            target = slot.targets.get(k)
            if target is None:
                target = slot.targets[k] = slot.buffer[: home.slab.nbytes]
            try:
                self.device.copy(target, home.host, slot.free, slot.ready)
            except BaseException as error:  # noqa: BLE001 -- raised when the block is called
                request.error = error
        return request

    def _needs_reader(self, home: Home) -> bool:
        """Whether bringing a block takes a thread's time: it is read, or copied from memory that no copy engine can read by itself."""
        return home.host is None or (home.tier is Tier.RAM and self.device.pageable_holds)

    def _read(self, home: Home, slot: _Slot, request: _Request) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.feeder.feed(home, slot.buffer, slot.free, slot.ready)
        except BaseException as error:  # noqa: BLE001 -- handed to whoever waits for the block, in its own thread
            request.error = error
        finally:
            request.issued.set()

    def _await_issue(self, request: _Request | None) -> None:
        if request is not None and not request.issued.is_set():
            started = time.perf_counter()
            request.issued.wait()
            self.stall_s += time.perf_counter() - started


def _places_of(home: Home) -> tuple[tuple[dict[str, Any], str, int], ...]:
    """Where the weights of a block are held, each with its number: what ``Slab.install`` walks through, flat: it is done twice a block."""
    weights = enumerate(home.slab.unit.weights)
    return tuple((owner.module._parameters, owner.attribute, number) for number, weight in weights for owner in weight.owners)


def _calls_under_way(module: nn.Module | None, ident: int) -> int:
    """How many calls of a module a thread is inside of."""
    count, frame = 0, sys._current_frames().get(ident)
    while frame is not None:
        # What torch's Module has as __call__; every call goes through it, compiled or not.
        count += frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count
