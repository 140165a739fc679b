"""Where weights wait while they are not on the device: pinned RAM, pageable RAM or disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from overflowml_core.facts import Tier
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.planner.residency import Residency

_RING_SLOTS = 2
"""Pinned buffers between disk and device: one is read into while the other is copied from."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A phase with its residency, before its weights have homes.

    Attributes:
        need: what it asks for.
        residency: which of its blocks stay.
        devices: per block, the device that computes it; empty where it is the first for all.
        expert_cache_bytes: of the device, for routed experts; where it is not 0, the sizes of the need are without these.
    """

    need: PhaseNeed
    residency: Residency
    devices: tuple[int, ...] = ()
    expert_cache_bytes: int = 0

    def indices(self, *, resident: bool) -> list[int]:
        """The resident blocks, or the streamed ones, without those that take no bytes."""
        flags = self.residency.resident
        return [i for i, size in enumerate(self.need.sizes_bytes) if size and flags[i] == resident]


@dataclass(slots=True)
class PhaseHomes:
    """Homes of one phase.

    Attributes:
        blocks: per block.
        fixed: of the weights outside blocks.
        ring_bytes: pinned RAM through which blocks from disk pass; 0 where none does.
        experts: per block, where its routed experts wait if they are apart from it; empty where none are.
    """

    blocks: list[Tier]
    fixed: Tier = Tier.DEVICE
    ring_bytes: int = 0
    experts: list[Tier | None] = field(default_factory=list)


@dataclass(slots=True)
class _Room:
    """What is left of the host while homes are given out, in bytes; pinned bytes are host bytes too."""

    pinned_bytes: int
    host_bytes: int

    def left(self, tier: Tier) -> int:
        return min(self.pinned_bytes, self.host_bytes) if tier is Tier.PINNED else self.host_bytes

    def take(self, tier: Tier, nbytes: int) -> None:
        self.host_bytes -= nbytes
        if tier is Tier.PINNED:
            self.pinned_bytes -= nbytes

    def first_that_holds(self, nbytes: int) -> Tier:
        for tier in (Tier.PINNED, Tier.RAM):
            if nbytes <= self.left(tier):
                self.take(tier, nbytes)
                return tier
        return Tier.DISK


def assign(drafts: Sequence[Draft], pinned_bytes: int, host_bytes: int) -> list[PhaseHomes]:
    """Give every weight a home.

    Streamed blocks come first, because they move at every pass, those of the phase with the most passes before all others;
    then what is resident only during its phase and moves once. In a network of one phase residents never leave the device.

    Args:
        drafts: the phases, in order.
        pinned_bytes: RAM that may be page-locked.
        host_bytes: RAM in all; 0 where the compute tier is RAM itself, so that everything outside it is on disk.
    """
    ringed: set[int] = set()
    while True:
        homes = [PhaseHomes([Tier.DEVICE] * len(draft.need.blocks)) for draft in drafts]
        room = _Room(pinned_bytes, host_bytes)
        _set_rings(drafts, homes, ringed, room)
        _place_streamed(drafts, homes, room)
        if len(drafts) > 1:
            _place_residents(drafts, homes, room)
        from_disk = {i for i, draft in enumerate(drafts) if Tier.DISK in {homes[i].blocks[b] for b in draft.indices(resident=False)}}
        # A ring takes pinned RAM from the blocks, which may send another phase's blocks to the disk. The set only grows.
        if host_bytes == 0 or from_disk <= ringed:
            break
        ringed |= from_disk
    for draft, phase in zip(drafts, homes, strict=True):
        phase.blocks = [phase.blocks[owner] for owner in draft.need.owners]
    return homes


def _set_rings(drafts: Sequence[Draft], homes: list[PhaseHomes], ringed: set[int], room: _Room) -> None:
    for index in sorted(ringed):
        slot_bytes = drafts[index].residency.slot_bytes
        # Too little pinned RAM for the ring is no reason to fail: what is not pinned is read through pageable memory.
        nbytes = min(_RING_SLOTS, room.left(Tier.PINNED) // slot_bytes) * slot_bytes
        homes[index].ring_bytes = nbytes
        room.take(Tier.PINNED, nbytes)


def _place_streamed(drafts: Sequence[Draft], homes: list[PhaseHomes], room: _Room) -> None:
    waiting = {i: drafts[i].indices(resident=False) for i in sorted(range(len(drafts)), key=lambda i: -drafts[i].need.passes)}
    for tier in (Tier.PINNED, Tier.RAM):
        for index, blocks in waiting.items():
            sizes = [drafts[index].need.sizes_bytes[block] for block in blocks]
            held = spread_within(sizes, room.left(tier))
            for block, is_held in zip(blocks, held, strict=True):
                if is_held:
                    homes[index].blocks[block] = tier
            room.take(tier, sum(size for size, is_held in zip(sizes, held, strict=True) if is_held))
            waiting[index] = [block for block, is_held in zip(blocks, held, strict=True) if not is_held]
    for index, blocks in waiting.items():
        for block in blocks:
            homes[index].blocks[block] = Tier.DISK


def _place_residents(drafts: Sequence[Draft], homes: list[PhaseHomes], room: _Room) -> None:
    for draft, phase in zip(drafts, homes, strict=True):
        if draft.need.fixed_bytes:
            phase.fixed = room.first_that_holds(draft.need.fixed_bytes)
        for block in draft.indices(resident=True):
            phase.blocks[block] = room.first_that_holds(draft.need.sizes_bytes[block])


def spread_within(sizes_bytes: Sequence[int], capacity_bytes: int) -> list[bool]:
    """Choose as many blocks as a capacity holds, evenly along the row, so that slow ones do not come one after the other."""
    total_bytes = sum(sizes_bytes)
    if total_bytes <= capacity_bytes:
        return [True] * len(sizes_bytes)
    chosen = []
    seen_bytes = chosen_bytes = 0
    for size in sizes_bytes:
        seen_bytes += size
        # Chosen so far may not run ahead of its share of what has been seen.
        chosen.append((chosen_bytes + size) * total_bytes <= capacity_bytes * seen_bytes)
        chosen_bytes += size * chosen[-1]
    for index, size in enumerate(sizes_bytes):
        if not chosen[index] and chosen_bytes + size <= capacity_bytes:
            chosen[index] = True
            chosen_bytes += size
    return chosen
