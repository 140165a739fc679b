"""Holds a plan against the modules that it is to be carried out on."""

from __future__ import annotations

from collections.abc import Mapping

from overflowml_core.errors import PlanMismatch
from overflowml_core.facts import Tier
from overflowml_core.loading import Loading
from overflowml_core.plan import PhasePlan, Placement
from overflowml_core.runtime.slab import lay_out
from overflowml_core.runtime.source import stored_as_is
from overflowml_core.runtime.structure import Structure, Unit


def match(phase: PhasePlan, structures: Mapping[str, Structure]) -> list[tuple[Unit, Tier, Tier]]:
    """The units of a phase, each with its tier and home, after checking that the plan speaks of these modules."""
    matched: list[tuple[Unit, Tier, Tier]] = []
    blocks: dict[tuple[str, str], Unit] = {}
    for name in phase.components:
        if name not in structures:
            raise PlanMismatch(f"the plan places component {name!r}, which this model does not have; make a plan for this model")
        matched.append((structures[name].fixed, Tier.DEVICE, phase.fixed_home))
        blocks.update(((name, unit.name), unit) for unit in structures[name].blocks)
    for placement in phase.placements:
        unit = blocks.pop((placement.component, placement.block), None)
        if unit is None or unit.slab_bytes != placement.stored_bytes:
            raise PlanMismatch(_mismatch(placement, unit))
        matched.append((unit, placement.tier, placement.home))
    if blocks:
        component, block = next(iter(blocks))
        raise PlanMismatch(f"{component}.{block}: the plan does not place this block; make a plan for this model")
    return matched


def comes_in(unit: Unit, home: Tier, loading: Loading | None) -> bool:
    """Whether attaching reads or packs a unit; one that is streamed from the model's own file stays where it is."""
    return home is not Tier.DISK or not stored_as_is(lay_out(unit, loading))


def _mismatch(placement: Placement, unit: Unit | None) -> str:
    found = "no such block" if unit is None else f"a block of {unit.slab_bytes} bytes"
    wanted = f"{placement.component}.{placement.block}: the plan has {placement.stored_bytes} bytes"
    return f"{wanted}, the model {found}; make a plan for this model"
