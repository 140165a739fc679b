"""From a plan back to what its times were reckoned from, so that whoever reads a plan sees the simulation behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.errors import PlanMismatch
from overflowml_core.facts import Block, Machine, Network, PassProfile, Tier
from overflowml_core.formats import Format
from overflowml_core.plan import PhasePlan, Placement, Plan
from overflowml_core.planner.conversion import Weight, weigh, weigh_apart
from overflowml_core.planner.cost import Conversion
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.leaves import as_placed
from overflowml_core.planner.needs import PhaseNeed, phase_needs
from overflowml_core.planner.residency import Residency
from overflowml_core.planner.setting import Setting, on_cpu, setting_of


def setting_behind(plan: Plan, network: Network, machine: Machine) -> Setting:
    """The setting in which a plan's times are reckoned: the CPU's where it runs there."""
    setting = setting_of(network, machine, plan.workload, plan.limits, (), frozenset())
    return on_cpu(setting) if plan.kind == "cpu" else setting


def drafts_behind(plan: Plan, network: Network, formats: Sequence[Format]) -> list[tuple[Draft, PhaseHomes]]:
    """The phases of a plan with their homes.

    Args:
        plan: what was decided.
        network: what it was decided for.
        formats: that it uses; of one that is not among them only the bytes are known, not what decoding takes.

    Raises:
        PlanMismatch: the plan was made for another network.
    """
    needs = phase_needs(as_placed(network, plan), plan.limits)
    if [need.name for need in needs] != [phase.name for phase in plan.phases]:
        raise PlanMismatch(f"plan {plan.fingerprint} has the phases of another network than {network.class_name}; make a plan for this one")
    return [_behind(phase, need, {one.name: one for one in formats}) for phase, need in zip(plan.phases, needs, strict=True)]


def _behind(phase: PhasePlan, need: PhaseNeed, formats: dict[str, Format]) -> tuple[Draft, PhaseHomes]:
    placements = phase.placements
    if [(p.component, p.block) for p in placements] != [(name, block.name) for name, block in need.blocks]:
        raise PlanMismatch(f"phase {phase.name}: the plan has other blocks than the network; make a plan for this one")
    weights = tuple(_weight(block, place, formats) for (_, block), place in zip(need.blocks, placements, strict=True))
    need = replace(
        need,
        sizes_bytes=tuple(place.stored_bytes for place in placements),
        weights=weights,
        activation_bytes=phase.activation_bytes,
        profiles=_profiles(phase, need),
        variant=phase.variant,
    )
    resident = tuple(place.tier is Tier.DEVICE for place in placements)
    devices = tuple(place.device for place in placements)
    draft = Draft(
        need,
        Residency(resident, phase.staging_bytes, phase.slot_bytes),
        devices if any(devices) else (),
        phase.expert_cache_bytes,
    )
    experts = [place.experts_home for place in placements]
    return draft, PhaseHomes([place.home for place in placements], phase.fixed_home, 0, experts if any(experts) else [])


def _profiles(phase: PhasePlan, need: PhaseNeed) -> tuple[tuple[PassProfile, ...], ...]:
    if not phase.variant:
        return need.profiles
    profiles = list(need.profiles)
    for place, component in enumerate(need.components):
        for variant in component.variants:
            if variant.name == phase.variant:
                profiles[place] = variant.profiles
                return tuple(profiles)
    return need.profiles


def _weight(block: Block, place: Placement, formats: dict[str, Format]) -> Weight:
    if not place.format:
        return weigh(block, None)
    known = formats.get(place.format)
    if known is not None:
        return weigh(block, known) if place.experts_home is None else weigh_apart(block, known)
    as_stored = weigh(block, None)
    element_bytes = block.stored_bytes // block.weight_count if block.weight_count else 2
    linear_bytes = min(block.linear_count * element_bytes, block.stored_bytes)
    if place.experts_home is not None or not linear_bytes or not place.stored_bytes:
        return replace(as_stored, format=place.format)
    shrink = min(1.0, max(0.0, 1 - (block.slab_bytes - place.stored_bytes) / linear_bytes))
    return replace(as_stored, format=place.format, slab_bytes=place.stored_bytes, conversion=Conversion(shrink))
