"""Slots of the device that hold experts: who is in which, who comes, who goes.

Note [order of copies and computing]. As for staging slots (see streamer.py): ``ready`` is recorded behind the copy into a slot, ``free``
behind the computing that read it; each waits for the other, the host for neither, but for reads from disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.encoded import Operand, operands_of
from overflowml_core.runtime.experts.fetcher import NOW, SOMETIME, SOON, Fetcher, Job
from overflowml_core.runtime.experts.policy import Ranking, warmest
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home

_READERS = 4
"""Threads that bring experts into RAM: each reads one, so that as many reads are in flight."""


class Slot:
    """Room for one expert."""

    __slots__ = ("buffer", "expected", "expert", "free", "index", "job", "ready", "tensors")

    def __init__(self, index: int, buffer: torch.Tensor, free: Any, ready: Any) -> None:
        self.index = index
        self.buffer = buffer
        self.free = free
        self.ready = ready
        self.expert: int | None = None
        self.job: Job | None = None
        self.tensors: tuple[Operand, ...] = ()
        self.expected = False
        """It was brought in because it was expected, and nobody has asked for it yet."""


class ExpertCache:
    """The cache of one phase. Experts are known by numbers over all of its banks. Not for several threads at once."""

    def __init__(self, device: Device, feeder: Feeder, homes: Sequence[Home], ranking: Ranking, sizes: tuple[int, int]) -> None:
        """Plan the cache; :meth:`open` takes its memory.

        Args:
            device: what computes.
            feeder: brings experts in.
            homes: of all experts.
            ranking: decides who goes.
            sizes: slots, and bytes of each.
        """
        self.device = device
        self.feeder = feeder
        self.homes = homes
        self.ranking = ranking
        self.slot_count, self.slot_bytes = min(sizes[0], len(homes)), sizes[1]
        self.arena: torch.Tensor | None = None
        self.wasted = 0
        """Experts that were expected and went before anybody asked for them."""
        self._free: list[Slot] = []
        self._slots: dict[int, Slot] = {}
        self._fetcher: Fetcher | None = None

    @property
    def is_open(self) -> bool:
        """Whether its memory is there."""
        return self.arena is not None

    def open(self) -> None:
        """Take the memory, and begin to bring in who was used most before.

        Raises:
            torch.OutOfMemoryError: the device has no room; nothing stays allocated.
        """
        if self.is_open or not self.slot_count:
            return
        arena = self.device.staging(self.slot_count * self.slot_bytes)
        for index in reversed(range(self.slot_count)):
            buffer = arena[index * self.slot_bytes : (index + 1) * self.slot_bytes]
            slot = Slot(index, buffer, self.device.new_event(), self.device.new_event())
            self.device.record(slot.free)
            self._free.append(slot)
        if any(self._needs_thread(home) for home in self.homes):
            self._fetcher = Fetcher(_READERS if self.device.on_host else 1)
        self.arena = arena
        for expert in warmest(self.ranking.levels, self.slot_count):
            self.request(expert, (), SOMETIME)

    def close(self) -> None:
        """Give the memory back. A second call does nothing."""
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.close()
        if self.is_open:
            self.device.synchronize()
        for expert in list(self._slots):
            self.ranking.drop(expert)
        self._slots, self._free, self.arena = {}, [], None

    def find(self, expert: int) -> Slot | None:
        """The slot that holds or awaits an expert."""
        return self._slots.get(expert)

    @property
    def experts(self) -> list[int]:
        """All experts that are in the cache or on their way, sorted."""
        return sorted(self._slots)

    def request(self, expert: int, held: Collection[int], urgency: int = NOW) -> Slot | None:
        """Have an expert in the cache.

        Args:
            expert: which.
            held: experts that must not go for it.
            urgency: one of the fetcher's.

        Returns:
            Its slot; None where there is no room, for all others are held or on their way.
        """
        slot = self._slots.get(expert)
        if slot is not None:
            if slot.job is not None and self._fetcher is not None:
                self._fetcher.hurry(slot.job, urgency)
            return slot
        slot = self._room(held, urgency)
        if slot is not None:
            self._fetch(slot, expert, urgency)
        return slot

    def _room(self, held: Collection[int], urgency: int) -> Slot | None:
        if self._free:
            return self._free.pop()
        coming: set[int] = set()
        while True:
            expert = self.ranking.coldest(coming.union(held) if coming else held)
            if expert is None:
                return None
            slot = self._slots[expert]
            # What only might be needed makes room for what is; what is being read already cannot be stopped.
            if slot.job is None or slot.job.is_done or (urgency < slot.job.urgency and slot.job.give_up()):
                break
            coming.add(expert)
        self._forget(slot)
        return slot

    def _forget(self, slot: Slot) -> None:
        if slot.expert is not None:
            self.ranking.drop(slot.expert)
            del self._slots[slot.expert]
        self.wasted += slot.expected
        slot.expert, slot.job, slot.tensors, slot.expected = None, None, (), False

    def _fetch(self, slot: Slot, expert: int, urgency: int) -> None:
        home = self.homes[expert]
        slot.expert, slot.expected = expert, urgency == SOON
        slot.tensors = operands_of(home.slab, slot.buffer)
        self._slots[expert] = slot
        self.ranking.add(expert)
        if self._needs_thread(home) and self._fetcher is not None:
            feeder, buffer, free, ready = self.feeder, slot.buffer, (slot.free,), slot.ready

            def feed() -> None:
                with torch.inference_mode(False), torch.no_grad():
                    feeder.feed(home, buffer, free, ready)

            slot.job = self._fetcher.submit(feed, urgency)
        else:
            self.feeder.feed(home, slot.buffer, (slot.free,), slot.ready)

    def _needs_thread(self, home: Home) -> bool:
        return home.host is None or (home.tier is Tier.RAM and self.device.pageable_holds)

    def wait_for_one(self) -> None:
        """Wait until an expert that is being read is there: nothing can be stopped that was begun."""
        job = next((slot.job for slot in self._slots.values() if slot.job is not None and not slot.job.is_done), None)
        if job is not None:
            job.wait()

    def is_here(self, slot: Slot) -> bool:
        """Whether the host need not wait for a slot's expert."""
        return slot.job is None or slot.job.is_done

    def settle(self, slot: Slot) -> None:
        """Have what is computed from now on see the expert of a slot.

        Raises:
            ReadFault: its file is gone or shorter than it was; the expert is not in the cache any more.
        """
        job = slot.job
        if job is not None:
            job.wait()
            if job.error is not None:
                self._forget(slot)
                self._free.append(slot)
                raise job.error
            slot.job = None
        self.device.wait(slot.ready)

    def release(self, slot: Slot) -> None:
        """What was queued for computing so far is all that reads the slot for now."""
        self.device.record(slot.free)

    def drop(self, experts: Collection[int]) -> None:
        """Have none of these experts in the cache: they have changed."""
        for expert in experts:
            slot = self._slots.get(expert)
            if slot is not None:
                if slot.job is not None:
                    slot.job.wait()
                self._forget(slot)
                self._free.append(slot)
