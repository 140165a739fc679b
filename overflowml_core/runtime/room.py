"""Makes room in a phase for what was added to its modules after it was planned: resident blocks are streamed from then on, and where that
is not enough there is less staging."""

from __future__ import annotations

from dataclasses import replace

from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan, Placement
from overflowml_core.staging import fitting


def with_room(phase: PhasePlan, wanted_bytes: int, budget_bytes: int) -> PhasePlan | None:
    """The phase with as few resident blocks less, and then as little less staging, as leave so many bytes free; None where it has to keep
    the largest slot and that is not enough.

    Blocks are taken out of the middle of the longest run of residents, so that those that stay are spread and copies hide behind them.

    Args:
        phase: as it was planned.
        wanted_bytes: to be left beside its weights, staging and activations.
        budget_bytes: of the device.
    """
    found = phase
    home = next((p.home for p in phase.streamed), Tier.DISK)
    while found.device_bytes + wanted_bytes > budget_bytes:
        index = _middle_resident(found.placements)
        if index is None:
            found = with_less_staging(found, budget_bytes - wanted_bytes)
            return found if found.device_bytes + wanted_bytes <= budget_bytes else None
        place = found.placements[index]
        home_of_it = place.home if place.home is not Tier.DEVICE else home
        places = (*found.placements[:index], replace(place, tier=home_of_it, home=home_of_it), *found.placements[index + 1 :])
        slot_bytes = max(found.slot_bytes if found.streamed else 0, place.stored_bytes)
        found = replace(found, placements=places, slot_bytes=slot_bytes, staging_bytes=max(found.staging_bytes, slot_bytes))
    return found


def with_less_staging(phase: PhasePlan, budget_bytes: int) -> PhasePlan:
    """The phase with as much staging as a budget leaves for it, but never less than its largest streamed block takes.

    Args:
        phase: as it was planned.
        budget_bytes: of the device.
    """
    over_bytes = phase.device_bytes - budget_bytes
    if over_bytes <= 0:
        return phase
    sizes = [place.stored_bytes for place in phase.streamed]
    return replace(phase, staging_bytes=max(fitting(sizes, phase.staging_bytes - over_bytes), phase.slot_bytes))


def _middle_resident(placements: tuple[Placement, ...]) -> int | None:
    best: range | None = None
    start = 0
    for index in range(len(placements) + 1):
        if index == len(placements) or placements[index].tier is not Tier.DEVICE:
            if index > start and (best is None or index - start > len(best)):
                best = range(start, index)
            start = index + 1
    return None if best is None else best[len(best) // 2]
