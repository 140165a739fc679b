"""The state machine that keeps the next block on its way while one computes: request, wait, release.

Note [slots and events]. A block comes into the slot behind that of the block before it, round and round in the staging buffer (see
note [round and round] in staging.py), so that neighbours share no byte where there is room for both, not even the last of a pass and
the first of the next. ``ready`` of a slot is recorded behind the copy into it, and whoever computes waits for it; ``free`` of a slot
is recorded behind the computation that read it, and whatever is copied over it next waits for that. Both directions are needed:
without the first a block computes with the previous block's weights, without the second a copy overwrites weights in use. The host
waits for neither; it waits only for the reader thread, where a block comes from disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.jobs import Workers
from overflowml_core.runtime.staging_slot import COPIED, Request, Slot, calls_under_way, places_of
from overflowml_core.staging import Place, behind, free_bytes, is_worth

_LOOK_AGAIN_S = 0.5
"""A thread that waits for a slot looks this often whether those who use it are still there."""

_MOST_ADDRESSES = 32
"""Of a block, whose parameters are kept; only blocks that are called in ever new orders come to lie in more places."""


class Streamer:
    """Streams the blocks of one phase through its staging buffer, in the order in which they are called.

    The order of the first pass is assumed to be that of the homes; every later pass is predicted by the one before. A block that is
    called out of order is fetched on the spot: slower, and right.
    """

    def __init__(self, device: Device, feeder: Feeder, homes: Sequence[Home], staging_bytes: int, spare_bytes: int = 0) -> None:
        """Plan the staging buffer; :meth:`open` takes it.

        Args:
            device: what computes.
            feeder: brings blocks into slots.
            homes: of the streamed blocks, in the order of the first pass.
            staging_bytes: of the buffer, at least those of the largest block.
            spare_bytes: of the budget, which a buffer in RAM may take in addition so that files can be read straight into it.
        """
        self.device = device
        self.feeder = feeder
        self.homes = tuple(homes)
        self.staging_bytes = min(staging_bytes, sum(home.slab.nbytes for home in self.homes))
        self.spare_bytes = spare_bytes
        self.pass_count = 0
        """Passes begun: how often the first block was called."""
        self.streamed_bytes = 0
        self.stall_s = 0.0
        """Seconds in which the host waited for the reader thread."""
        self._buffer: torch.Tensor | None = None
        self._opened: Any = None
        """Behind what the memory of the buffer was used for before."""
        self._waits_for_opened = False
        """Whether every copy waits for it, not only those over bytes that no copy went to before."""
        self._staged: list[Home] = []
        self._sizes: list[int] = []
        self._by_reader: list[bool] = []
        self._limit = 0
        """Bytes of the buffer that blocks may lie in."""
        self._held: list[Slot | None] = [None] * len(self.homes)
        """Per block, the slot that holds or awaits it."""
        self._live: list[Slot] = []
        """These slots, in the order in which they were sent for."""
        self._known: list[dict[int, Slot]] = [{} for _ in self.homes]
        """Per block, its slots by their first byte."""
        self._end = 0
        """The byte behind the block that was called last."""
        self._places = [places_of(home) for home in self.homes]
        self._successor = [(k + 1) % len(self.homes) for k in range(len(self.homes))]
        self._previous: int | None = None
        # Taken through the lock itself, and told only where somebody waits: it happens twice a block.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._waiting = 0
        self._reader: Workers | None = None

    @property
    def is_open(self) -> bool:
        """Whether the staging buffer is allocated."""
        return self._buffer is not None

    def open(self) -> None:
        """Allocate the staging buffer and start the first copies.

        Raises:
            torch.OutOfMemoryError: the device has no room; nothing stays allocated.
        """
        if self.is_open or not self.homes:
            return
        self._staged, self._sizes, self._limit = self.feeder.staged(self.homes, self.staging_bytes, self.spare_bytes)
        self._buffer = self.device.staging(self._limit)
        self._places = [places_of(home) for home in self.homes]  # weights may have been let go since the last time
        # The allocator may hand out memory that queued work still reads; the first copies wait for that work.
        self._opened = self.device.new_event()
        self.device.record(self._opened)
        self._waits_for_opened = False
        self._by_reader = [self._needs_reader(home) for home in self._staged]
        if any(self._by_reader):
            # In RAM the next block's reads stand in line behind the present one's, so that the disk never pauses; a ring serves one
            # after the other.
            count = max(2, self._limit // max(self._sizes)) if self.device.on_host else 1
            self._reader = Workers(count, "overflowml-reader")
        with self._lock:
            self._end = 0
            self._prefetch(0)

    def close(self) -> None:
        """Free the staging buffer; all blocks are at home afterwards. A second call does nothing."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self.is_open:
            self.device.synchronize()
        for home in self.homes:
            home.slab.install(home.parameters)
        for slot in self._live:
            slot.request = None  # one that nobody carried out refers to its slot
        self._buffer, self._staged, self._live, self._previous = None, [], [], None
        self._held, self._known = [None] * len(self.homes), [{} for _ in self.homes]

    def wait(self, k: int) -> None:
        """Have block k on the device and installed; called right before it computes.

        Raises:
            ReadFault: its file is gone or shorter than it was. The next call tries again.
            Unsupported: the calling thread is inside another block that uses the same slot.
        """
        me = threading.get_ident()
        with self._lock:
            slot, nbytes = self._held[k], self._sizes[k]
            if slot is None or slot.sent_bytes < nbytes or me in slot.users:
                slot = self._slot_for(k, me)
            request = slot.request
            if request is None or slot.sent_bytes < nbytes:
                under = self._under(slot, nbytes)
                for other in under:
                    self._await_issue(other.request)  # a read under way to these bytes ends first
                request = self._send(slot, nbytes, under)
            slot.users.append(me)
            self._end = slot.place.end
            self.pass_count += k == 0
            if self._previous is not None and self._previous != k:
                self._successor[self._previous] = k
            self._previous = k
        try:
            if not request.done.is_open:
                self._await_issue(request)
            if request.error is not None:
                raise request.error
            self.device.wait(slot.ready)
            if slot.parameters is None:
                slot.parameters = self._staged[k].slab.parameters(slot.target)
            self._install(k, slot.parameters)
        except BaseException:
            self.release(k, failed=True)
            raise

    def _slot_for(self, k: int, me: int) -> Slot:
        """The slot that holds block k, or one for it: behind the block called last, the first whose bytes nobody computes with."""
        while True:
            held = self._held[k]
            if held is not None:
                if me in held.users:
                    self._take_back(held, k)
                if self._has_room(held):
                    return held
                self._drop(held)
            for slot in self._live:
                if me in slot.users:
                    self._take_back(slot, k)
            busy = [slot for slot in self._live if slot.users]
            ends = sorted((slot.place.end for slot in busy), key=lambda end: (end - self._end) % self._limit)
            for end in (self._end, *ends, 0):
                place = behind(end, self._sizes[k], self._limit)
                if free_bytes(place, [slot.place for slot in busy]) == self._sizes[k]:
                    return self._slot_at(k, place)
            if all(me in slot.users for slot in busy):
                raise Unsupported(
                    f"block {self.homes[k].slab.unit.name} is called inside {self.homes[busy[0].k].slab.unit.name}, and the staging buffer "
                    "does not hold both; give the budget room for both, so that they stay resident"
                )
            self._waiting += 1
            try:
                is_told = self._condition.wait(_LOOK_AGAIN_S)
            finally:
                self._waiting -= 1
            if not is_told:
                for slot in busy:
                    self._take_back(slot, k)

    def _has_room(self, slot: Slot) -> bool:
        """Whether nobody computes with bytes of a slot that are still to come."""
        busy = [other.place for other in self._live if other.users and other is not slot]
        return slot.sent_bytes == self._sizes[slot.k] or free_bytes(slot.place, busy) == self._sizes[slot.k]

    def _slot_at(self, k: int, place: Place) -> Slot:
        """A slot in which nothing was sent for so far."""
        assert self._buffer is not None  # whoever asks is open
        known = self._known[k]
        slot = known.get(place.start)
        if slot is None:
            if len(known) == _MOST_ADDRESSES:
                known.clear()
            target = self._buffer[place.start : place.start + self._staged[k].slab.nbytes]
            slot = known[place.start] = Slot(k, place, target, self.device.new_event(), self.device.new_event())
        slot.place, slot.sent_bytes, slot.request, slot.over = place, 0, None, []
        return slot

    def release(self, k: int, failed: bool = False) -> None:
        """Give block k's slot free behind what was computed with it, and start the next copies."""
        me = threading.get_ident()
        with self._lock:
            slot = self._held[k]
            if slot is None or me not in slot.users:
                return
            # Whose it is changes last: what an interrupt breaks off here is done again when this thread comes back.
            if len(slot.users) == 1:
                self.device.record(slot.free)
                self._install(k, self.homes[k].parameters)
                if failed:
                    self._wait_for_all()
                    self._drop(slot)
                    slot.request = None  # its error refers to all that the call computed, and a slot is kept for the next time
            slot.users.remove(me)
            if self._waiting:
                self._condition.notify_all()
            if not failed:
                self._prefetch(self._successor[k])

    def forked(self) -> None:
        """In a process that was forked: what was under way is nobody's, and no lock is taken by a thread that is not there."""
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._live, self._held = [], [None] * len(self.homes)

    def begin_pass(self) -> None:
        """Take back what this thread left in use when an interrupt broke off its last pass."""
        me = threading.get_ident()
        with self._lock:
            stale = [slot.k for slot in self._live if me in slot.users]
        for k in stale:
            self.release(k)

    def _take_back(self, slot: Slot, k: int) -> None:
        """Before a call of block k, free a slot from calls that ended in what no hook sees: an interrupt, the end of a thread."""
        home, me = self.homes[slot.k], threading.get_ident()
        left: list[int] = []
        for user in set(slot.users):
            inside = calls_under_way(home.slab.unit.module, user) - (user == me and slot.k == k)
            left += [user] * min(inside, slot.users.count(user))
        if not left:
            self.device.record(slot.free)
            self._install(slot.k, home.parameters)
        slot.users = left

    def _install(self, k: int, parameters: tuple[nn.Parameter, ...]) -> None:
        for place, attribute, number in self._places[k]:
            place[attribute] = parameters[number]

    def _prefetch(self, k: int) -> None:
        """Send for a block and its successors as far as their bytes are free of those before them."""
        claimed = [slot.place for slot in self._live if slot.users]
        end, left = self._end, self._limit
        for place in claimed:
            left -= place.end - place.start
        for _ in self.homes:
            nbytes, slot = self._sizes[k], self._held[k]
            if slot is None or slot.sent_bytes < nbytes:
                if slot is None and not is_worth(nbytes, 0, left):
                    return
                place = behind(end, nbytes, self._limit) if slot is None else slot.place
                # One that another thread computes with is among those that are claimed.
                free = nbytes if not claimed or (slot is not None and slot.users) else free_bytes(place, claimed)
                sent_bytes = 0 if slot is None else slot.sent_bytes
                if free < nbytes and (self._by_reader[k] or not is_worth(nbytes, sent_bytes, free)):
                    return
                slot = slot or self._slot_at(k, place)
                under = self._under(slot, free)
                if self._reader is None or all(other.request is None or other.request.done.is_open for other in under):
                    self._send(slot, free, under)
                if free < nbytes:
                    return
            if not slot.users:
                claimed.append(slot.place)
                left -= nbytes
            end, k = slot.place.end, self._successor[k]

    def _under(self, slot: Slot, upto_bytes: int) -> list[Slot]:
        """The slots that the next bytes of one put an end to; nobody computes with them."""
        place, sent_bytes = slot.place, slot.sent_bytes
        return [
            other for other in self._live if place.overwrites(other.place, sent_bytes, upto_bytes) and other is not slot and not other.users
        ]

    def _drop(self, slot: Slot) -> None:
        if self._held[slot.k] is slot:
            self._held[slot.k] = None
        if slot in self._live:  # one that is not held does no harm there; one that is held and not there would be overwritten unseen
            self._live.remove(slot)

    def _wait_for_all(self) -> None:
        """A copy that was to wait for what lay in the buffer may never have been queued: whatever comes next waits for all of it."""
        self.device.record(self._opened)
        self._waits_for_opened = True

    def _send(self, slot: Slot, upto_bytes: int, under: Sequence[Slot]) -> Request:
        """Have a slot filled so far, over what lies under these bytes; what comes from RAM may come in parts."""
        try:
            return self._fill(slot, upto_bytes, under)
        except BaseException:
            if not self._by_reader[slot.k]:
                self._drop(slot)
            self._wait_for_all()
            raise

    def _fill(self, slot: Slot, upto_bytes: int, under: Sequence[Slot]) -> Request:
        k, sent_bytes = slot.k, slot.sent_bytes
        home, reader = self._staged[k], self._reader if self._by_reader[k] else None
        after = [other.free for other in under]
        if not after or self._waits_for_opened:
            after.append(self._opened)
        if self._reader is not None:
            slot.over += [(other.place, other.free) for other in under]
            # What a read under way put an end to is not waited for by any copy so far; of all else the copies before this one waited.
            reads = [other for other in self._live if other.request is not None and not other.request.done.is_open]
            ended = [over for other in reads for over in other.over if slot.place.overwrites(over[0], sent_bytes, upto_bytes)]
            slot.over += ended
            after += [free for _, free in ended]
        for other in under:
            self._drop(other)
        request = slot.request
        if request is None:
            request = COPIED if reader is None else Request(partial(self._read, home, slot, after))
            slot.request = request
            self._live.append(slot)
            self._held[k] = slot
            self.streamed_bytes += home.slab.nbytes
        slot.sent_bytes = upto_bytes
        if reader is not None:
            reader.submit(request)
        elif home.host is not None:
            try:
                if upto_bytes - sent_bytes < home.slab.nbytes:
                    self.device.copy(slot.target[sent_bytes:upto_bytes], home.host[sent_bytes:upto_bytes], after, slot.ready)
                else:
                    self.device.copy(slot.target, home.host, after, slot.ready)
            except Exception as error:  # noqa: BLE001 -- raised when the block is called
                # Its traceback would keep what is computed now until the block is called.
                request = slot.request = Request.at_once(error.with_traceback(None))
        return request

    def _needs_reader(self, home: Home) -> bool:
        """Whether bringing a block takes a thread's time: it is read, or copied from memory that no copy engine can read by itself."""
        return home.host is None or (home.tier is Tier.RAM and self.device.pageable_holds)

    def _read(self, home: Home, slot: Slot, after: Sequence[Any]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.feeder.feed(home, slot.target, after, slot.ready)

    def _await_issue(self, request: Request | None) -> None:
        if request is not None and not request.done.is_open:
            started = time.perf_counter()
            request.wait()
            self.stall_s += time.perf_counter() - started
