"""Ways to divide the room of a phase between residents and the staging buffer, its weights in the formats that they have. Compares none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from overflowml_core.facts import Tier
from overflowml_core.planner import reasons
from overflowml_core.planner.candidates import chosen_residency
from overflowml_core.planner.estimates import PhaseForecast, forecast
from overflowml_core.planner.homes import Draft, PhaseHomes, assign
from overflowml_core.planner.memory import pinned_budget
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.planner.residency import Residency, choose, spread
from overflowml_core.planner.setting import Setting

_MOST_SLOTS = 4
_MOST_LOOKS = 64
"""Numbers of residents that are looked at for one number of slots."""

Key = tuple[tuple[bool, ...], int]
"""What tells one split from another: which blocks stay, and how large the staging buffer is."""


@dataclass(frozen=True, slots=True)
class Split:
    """One way to run a phase: its residency, where its weights wait, and what it is predicted to take."""

    draft: Draft
    homes: PhaseHomes
    forecast: PhaseForecast

    @property
    def key(self) -> Key:
        """See :data:`Key`."""
        return self.draft.residency.resident, self.draft.residency.staging_bytes

    @property
    def total_s(self) -> float | None:
        """Seconds of all of its passes in a unit of work; None where nobody knows."""
        return self.forecast.estimate.total_s


def split_of(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> Split:
    """A phase as it is, with what it is predicted to take."""
    return Split(draft, homes, forecast(draft, homes, setting, takes_turns))


def other_splits(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> list[Split]:
    """Other residencies of a phase within the same budget: the choice by time, the one with the most bytes, and beside staging for one to
    four of the largest block as many residents as fit, one fewer, half of them, and none.

    Args:
        draft: the phase as it is.
        homes: where its weights wait. Where phases take turns every block keeps its home; else what leaves the device is given one.
        setting: with the budget to keep to and the rates to reckon with.
        takes_turns: other phases come before and after.
    """
    found: dict[Key, Split] = {}
    own = draft.residency.resident, draft.residency.staging_bytes
    for residency in _residencies(draft.need, setting, takes_turns):
        key = residency.resident, residency.staging_bytes
        if key == own or key in found or (residency.staging_bytes == 0 and not takes_turns):
            continue
        other = replace(draft, residency=residency)
        waiting = homes if takes_turns else _homes(other, setting)
        if waiting is not None and not _is_barred(other, waiting, setting):
            found[key] = split_of(other, waiting, setting, takes_turns)
    return list(found.values())


def _residencies(need: PhaseNeed, setting: Setting, takes_turns: bool) -> Iterator[Residency]:
    room_bytes = setting.budget.device_bytes - need.fixed_bytes - need.activation_bytes
    for found in (chosen_residency(setting, need, takes_turns), choose(need.sizes_bytes, need.owners, room_bytes)):
        if found is not None:
            yield found
    whole = [index for index, size in enumerate(need.sizes_bytes) if size]
    for slot_count in range(1, _MOST_SLOTS + 1):
        most = None
        for kept in range(len(whole) - slot_count - 1, -1, -max(1, len(whole) // _MOST_LOOKS)):
            most = _evenly(need, whole, kept, slot_count, room_bytes)
            if most is not None:
                fewer = {kept, kept - 1, kept // 2, 0}
                evenly = (_evenly(need, whole, count, slot_count, room_bytes) for count in sorted(fewer, reverse=True) if count >= 0)
                yield from (one for one in evenly if one is not None)
                break


def _evenly(need: PhaseNeed, whole: list[int], kept: int, slot_count: int, room_bytes: int) -> Residency | None:
    """So many residents spread evenly along the row; None where they do not fit beside the slots."""
    stays = [not size for size in need.sizes_bytes]
    for index, stay in zip(whole, spread(kept, len(whole)), strict=True):
        stays[index] = stay
    slot_bytes = max(need.sizes_bytes[index] for index in whole if not stays[index])
    kept_bytes = sum(size for size, stay in zip(need.sizes_bytes, stays, strict=True) if stay)
    if kept_bytes + slot_count * slot_bytes > room_bytes:
        return None
    return Residency(tuple(stays[owner] for owner in need.owners), slot_count * slot_bytes, slot_bytes)


def _homes(draft: Draft, setting: Setting) -> PhaseHomes | None:
    (homes,) = assign([draft], pinned_budget(setting.machine, setting.budget), setting.budget.host_bytes)
    if not setting.limits.allow_disk and reasons.disk_refusal([draft], [homes], setting.machine, setting.budget) is not None:
        return None
    return homes


def _is_barred(draft: Draft, homes: PhaseHomes, setting: Setting) -> bool:
    barred = setting.limits.excluded
    for weight, home, stays in zip(draft.need.weights, homes.blocks, draft.residency.resident, strict=True):
        tiers = {home.value, Tier.DEVICE.value if stays else home.value, "*"}
        if weight.format and barred & {(weight.format, tier) for tier in tiers}:
            return True
    return False
