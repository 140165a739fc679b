"""Moves the blocks of a phase from one plan to another of the same network, one by one, within the budget. Decides on no plan.

Every block has its bytes in a whole place at any moment: a resident without a home gets one before its memory on the device is let go,
and a home is let go only behind the copy to the device. So whatever fails, nothing is lost, and the way back is the same moves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import FileMaps, Home, home_in_ram, home_on_device, home_on_disk, rehome
from overflowml_core.runtime.hooking import hook_blocks, unhook_blocks
from overflowml_core.runtime.phase import Phase
from overflowml_core.runtime.room import with_less_staging
from overflowml_core.runtime.slab import Slab
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.streamer import Streamer

_log = logging.getLogger("overflowml")

BlockKey = tuple[str, str]
"""Component and block."""


@dataclass(slots=True)
class Held:
    """A slab with its home and, where it never leaves the device, its arena; what detaching needs to know."""

    slab: Slab
    home: Home
    arena: torch.Tensor | None
    devices: tuple[torch.device, ...]


class Mover:
    """Gives slabs other homes, the device among them.

    Args:
        device: what computes.
        feeder: brings slabs to it.
        maps: files as the process sees them.
        open_store: opens the packed store, for slabs that no file holds.
    """

    def __init__(self, device: Device, feeder: Feeder, maps: FileMaps, open_store: Callable[[], PackedStore]) -> None:
        self._device = device
        self._feeder = feeder
        self._maps = maps
        self._open_store = open_store

    def house(self, slab: Slab, tier: Tier, devices: tuple[torch.device, ...]) -> Held:
        """Bring a slab to its first home, from wherever its weights come from.

        Args:
            slab: none of whose weights moved yet.
            tier: of the home.
            devices: where each weight was, to go back to.

        Raises:
            torch.OutOfMemoryError, MemoryError: the tier has no room.
            ReadFault, OverflowmlError: a file is not what it was, or the packed store cannot be written.
        """
        arena: torch.Tensor | None = None
        if tier is Tier.DEVICE:
            arena = self._device.empty(slab.nbytes)
            self._feeder.load(slab, arena)
            shown = slab.parameters(arena)
            home = home_on_device(slab, arena, self._maps)
        else:
            if tier is Tier.DISK:
                home = home_on_disk(slab, self._feeder.reader, self._maps, self._open_store)
            else:
                home = home_in_ram(slab, self._device, tier is Tier.PINNED, self._feeder.reader)
            shown = home.parameters
        slab.install(shown)
        return Held(slab, home, arena, devices)

    def settle(self, held: Held, tier: Tier) -> None:
        """Give a slab its home in a tier; DEVICE makes it resident for good. Where that fails it stays where it was.

        Raises:
            torch.OutOfMemoryError, MemoryError: the tier has no room.
            ReadFault, OverflowmlError: a file is not what it was, or the packed store cannot be written.
        """
        if tier is held.home.tier:
            return
        if tier is Tier.DEVICE:
            self._bring(held)
            return
        if tier is Tier.DISK:
            home = home_on_disk(held.slab, self._feeder.reader, self._maps, self._open_store)
        elif held.arena is not None:
            home = self._copied_out(held.slab, held.arena, tier is Tier.PINNED)
        else:
            home = home_in_ram(held.slab, self._device, tier is Tier.PINNED, self._feeder.reader)
        held.slab.install(home.parameters)
        held.home, held.arena = home, None

    def _bring(self, held: Held) -> None:
        arena = self._device.empty(held.slab.nbytes)
        start, end = self._device.new_event(), self._device.new_event()
        self._device.record(start)
        self._feeder.feed(held.home, arena, (start,), end)
        # The home is let go next: its memory must not be handed out while the copy reads it.
        self._device.wait_on_host(end)
        parameters = held.slab.parameters(arena)
        held.home = home_on_device(held.slab, arena, self._maps)
        held.slab.install(parameters)
        held.arena = arena

    def _copied_out(self, slab: Slab, arena: torch.Tensor, pin: bool) -> Home:
        # Of the device, not of the files: what somebody wrote into the weights since is true.
        host = self._device.host_buffer(slab.nbytes, pin)
        host.copy_(arena[: slab.nbytes])
        return Home(slab, Tier.PINNED if pin else Tier.RAM, rehome(slab, lambda entry: entry.view(host)), host=host)

    def move(self, held: Mapping[BlockKey, Held], wanted: PhasePlan, budget_bytes: int) -> None:
        """Give the blocks of a phase the homes of another plan.

        Those that come to the device and those that leave it take turns, so that neither the device nor RAM holds more at any moment than
        under one of both plans, and one block. No staging buffer may be open.

        Raises:
            Whatever :meth:`settle` raises; every block is back where it was then, as far as that could be done.
        """
        blocks = {(place.component, place.block): place for place in wanted.placements}
        before = {key: held[key].home.tier for key in blocks}
        changed = [key for key, place in blocks.items() if place.home is not before[key]]
        coming = [key for key in changed if blocks[key].home is Tier.DEVICE]
        others = [key for key in changed if blocks[key].home is not Tier.DEVICE]
        resident_bytes = sum(held[key].slab.nbytes for key in blocks if before[key] is Tier.DEVICE)
        room_bytes = budget_bytes - wanted.fixed_bytes - resident_bytes
        moved: list[BlockKey] = []
        try:
            while coming or others:
                fits = bool(coming) and held[coming[0]].slab.nbytes <= room_bytes
                key = (coming if fits or not others else others).pop(0)
                self.settle(held[key], blocks[key].home)
                moved.append(key)
                was_there, is_there = before[key] is Tier.DEVICE, blocks[key].home is Tier.DEVICE
                room_bytes += (was_there - is_there) * held[key].slab.nbytes
        except BaseException:
            self._move_back(held, {key: before[key] for key in reversed(moved)})
            raise

    def _move_back(self, held: Mapping[BlockKey, Held], tiers: Mapping[BlockKey, Tier]) -> None:
        for key, tier in tiers.items():
            try:
                self.settle(held[key], tier)
            except Exception as error:  # noqa: BLE001 -- what made the move fail is raised; this block goes on from where it is
                _log.warning("%s.%s stays in %s: %s", *key, held[key].home.tier.value, error)


def as_held(phase: PhasePlan, held: Mapping[BlockKey, Held], takes_turns: bool, budget_bytes: int) -> PhasePlan:
    """The phase with its blocks where they are: the same one, except where a way back failed.

    Args:
        phase: where they should be.
        held: where they are.
        takes_turns: residents have homes outside the device.
        budget_bytes: of the device; staging is given up before it is passed.
    """
    if takes_turns:
        places = tuple(replace(p, home=(home := held[p.component, p.block].home.tier), tier=_tier(p.tier, home)) for p in phase.placements)
    else:
        places = tuple(replace(p, home=(home := held[p.component, p.block].home.tier), tier=home) for p in phase.placements)
    if places == phase.placements:
        return phase
    slot_bytes = max((p.stored_bytes for p in places if p.tier is not Tier.DEVICE), default=0)
    staging_bytes = max(slot_bytes, phase.staging_bytes) if slot_bytes else 0
    return with_less_staging(replace(phase, placements=places, slot_bytes=slot_bytes, staging_bytes=staging_bytes), budget_bytes)


def _tier(tier: Tier, home: Tier) -> Tier:
    return tier if tier is Tier.DEVICE else home


def take_down(phase: Phase, empty: Streamer) -> None:
    """Have a phase that is not on the device refer to no block, so that homes that are left are free; ``empty`` streams nothing."""
    unhook_blocks(phase)
    phase.residents = [home for home in phase.residents if home.slab.unit.module is None]
    phase.streamer = empty


def set_up(
    phase: Phase,
    plan: PhasePlan,
    held: Mapping[BlockKey, Held],
    stream: Callable[[PhasePlan, Sequence[Home]], Streamer],
    bring: Callable[[Phase], None],
) -> None:
    """Let a phase that was taken down go on under a plan.

    Args:
        phase: with its fixed weights.
        plan: where its blocks are.
        held: the blocks.
        stream: makes a streamer of homes.
        bring: has a phase on the device.
    """
    blocks = [(place, held[place.component, place.block]) for place in plan.placements]
    phase.plan = plan
    phase.residents += [one.home for place, one in blocks if place.tier is Tier.DEVICE and one.arena is None]
    phase.streamer = stream(plan, [one.home for place, one in blocks if place.tier is not Tier.DEVICE])
    hook_blocks(phase, bring)


def check_same(present: Plan, wanted: Plan) -> None:
    """Hold a plan against the one that runs.

    Raises:
        PlanMismatch: it is for another network, with other formats or variants, or with fixed weights elsewhere.
    """
    turns = [plan.takes_turns and len(plan.phases) > 1 for plan in (present, wanted)]
    if len(present.phases) != len(wanted.phases) or turns[0] != turns[1]:
        ran, asked = (f"{plan.strategy} in {len(plan.phases)} phases" for plan in (present, wanted))
        raise PlanMismatch(f"plan {wanted.fingerprint} is {asked}, and {ran} is what runs; release the model and load it with that plan")
    for before, after in zip(present.phases, wanted.phases, strict=True):
        same = [(p.component, p.block, p.stored_bytes, p.format, p.device) for p in before.placements]
        if same != [(p.component, p.block, p.stored_bytes, p.format, p.device) for p in after.placements]:
            raise PlanMismatch(
                f"plan {wanted.fingerprint}, phase {after.name}: other blocks or formats than those that run; release the model first"
            )
        if (before.fixed_home, before.variant, before.components) != (after.fixed_home, after.variant, after.components):
            raise PlanMismatch(
                f"plan {wanted.fingerprint}, phase {after.name}: another variant, other components, or fixed weights in another tier than "
                "those that run; release the model first"
            )


def check_movable(phases: Sequence[Phase]) -> None:
    """Hold an engine's phases against what moves with them.

    Raises:
        Unsupported: there are none any more, or one was cast or has guests, of which no other plan knows.
    """
    if not phases or any(phase.casts or phase.guests.nbytes for phase in phases):
        raise Unsupported(
            "rearranging weights that were given back or cast, or that others were added to; load the model with the plan that is wanted"
        )
