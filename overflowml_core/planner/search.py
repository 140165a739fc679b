"""Decides on a plan: everything stays, or the phases take turns, or blocks are streamed. Pure: same arguments, same plan."""

from __future__ import annotations

from collections.abc import Sequence

from overflowml_core.facts import Limits, Machine, Network, Tier, Workload
from overflowml_core.formats import Format
from overflowml_core.plan import Budget, Estimate, PhasePlan, Placement, Plan
from overflowml_core.planner import homes, reasons
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.memory import PhaseNeed, phase_needs, pinned_budget, resolve_budget, together_bytes
from overflowml_core.planner.residency import Residency, choose


def make_plan(
    network: Network,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    formats: tuple[Format, ...] = (),
    abilities: frozenset[str] = frozenset(),
) -> Plan:
    """Decide which weights stay on the device and which are streamed to it, from where.

    Args:
        network: what runs, with exact sizes.
        machine: what it runs on.
        workload: what it will be asked to do; it is kept in the plan, its bytes are already in the network's activations.
        limits: what the user grants.
        formats: what weights may be converted into.
        abilities: what can be carried out beyond residency and streaming.

    Returns:
        A plan that has passed its own check.

    Raises:
        DoesNotFit: no plan respects the limits; the message says how much is missing, where, and what would help.
    """
    budget, budget_reasons = resolve_budget(machine, limits)
    needs = phase_needs(network, limits)
    direct = together_bytes(needs) <= budget.device_bytes
    if direct:
        drafts = tuple(Draft(need, Residency((True,) * len(need.blocks), 0, 0)) for need in needs)
        phase_homes = [PhaseHomes([Tier.DEVICE] * len(need.blocks)) for need in needs]
    else:
        drafts = _drafts(needs, machine, limits, budget.device_bytes)
        phase_homes = homes.assign(drafts, pinned_budget(machine, budget), budget.host_bytes)
        if not limits.allow_disk:
            _refuse_disk(drafts, phase_homes, machine, budget)
    phases = tuple(_phase_plan(draft, home, machine) for draft, home in zip(drafts, phase_homes, strict=True))
    strategy = "direct" if direct else "stream" if any(phase.streamed for phase in phases) else "phased"
    plan = Plan(
        strategy=strategy,
        network=network.class_name,
        network_fingerprint=network.fingerprint,
        weight_bytes=network.weight_bytes,
        device=machine.compute.torch_name,
        device_name=machine.compute.name,
        workload=workload,
        limits=limits,
        budget=budget,
        phases=phases,
        estimate=_whole_estimate(phases, together_bytes(needs) if direct else None),
        rejected=reasons.rejected(strategy, needs, budget.device_bytes),
        # What the host could spare says nothing about a plan that leaves it alone.
        reasons=(budget_reasons[:1] if direct else budget_reasons) + reasons.sentences(drafts, phases, machine, limits),
    )
    return plan.check()


def smallest_budget_bytes(network: Network, machine: Machine, limits: Limits) -> int:
    """The smallest device budget in bytes with which :func:`make_plan` finds a plan.

    Every phase must hold its weights outside blocks, one slot for its largest block, and its activations. Where the only
    place outside the compute tier is a disk that may not be used, everything has to stay. Whether RAM beside an accelerator
    holds what waits there is not asked: with ``allow_disk`` it always has somewhere to go.
    """
    needs = phase_needs(network, limits)
    if machine.compute.unified and not limits.allow_disk:
        return together_bytes(needs)
    return max((need.smallest_bytes for need in needs), default=0)


def _drafts(needs: Sequence[PhaseNeed], machine: Machine, limits: Limits, device_bytes: int) -> tuple[Draft, ...]:
    drafts = []
    for need in needs:
        residency = choose(need.sizes_bytes, need.owners, device_bytes - need.fixed_bytes - need.activation_bytes)
        if residency is None:
            raise reasons.device_shortfall(needs, machine, limits, device_bytes)
        drafts.append(Draft(need, residency))
    return tuple(drafts)


def _refuse_disk(drafts: Sequence[Draft], phase_homes: Sequence[PhaseHomes], machine: Machine, budget: Budget) -> None:
    needs = [draft.need for draft in drafts]
    for need, phase in zip(needs, phase_homes, strict=True):
        if Tier.DISK not in (phase.fixed, *phase.blocks):
            continue
        if machine.compute.unified:
            raise reasons.only_disk_outside(need.name, needs, machine, budget.device_bytes)
        outside_bytes = sum(_outside_bytes(d, h) for d, h in zip(drafts, phase_homes, strict=True))
        raise reasons.host_shortfall(need.name, needs, machine, outside_bytes, budget.host_bytes)


def _outside_bytes(draft: Draft, phase: PhaseHomes) -> int:
    fixed_bytes = draft.need.fixed_bytes if phase.fixed is not Tier.DEVICE else 0
    return fixed_bytes + sum(size for size, home in zip(draft.need.sizes_bytes, phase.blocks, strict=True) if home is not Tier.DEVICE)


def _phase_plan(draft: Draft, phase: PhaseHomes, machine: Machine) -> PhasePlan:
    need, residency = draft.need, draft.residency
    placements = tuple(
        Placement(component=component, block=block.name, tier=Tier.DEVICE if stays else home, home=home, stored_bytes=size)
        for (component, block), size, stays, home in zip(need.blocks, need.sizes_bytes, residency.resident, phase.blocks, strict=True)
    )
    return PhasePlan(
        name=need.name,
        components=tuple(component.name for component in need.components),
        fixed_bytes=need.fixed_bytes,
        fixed_home=phase.fixed,
        slot_count=residency.slot_count,
        slot_bytes=residency.slot_bytes,
        activation_bytes=need.activation_bytes,
        placements=placements,
        estimate=_phase_estimate(draft, phase, placements, machine),
    )


def _phase_estimate(draft: Draft, phase: PhaseHomes, placements: Sequence[Placement], machine: Machine) -> Estimate:
    need, residency = draft.need, draft.residency
    held = dict.fromkeys(Tier, 0)
    moved = dict.fromkeys(Tier, 0)
    held[phase.fixed] += need.fixed_bytes
    for placement in placements:
        held[placement.home] += placement.stored_bytes
        moved[placement.tier] += placement.stored_bytes
    resident_bytes = moved.pop(Tier.DEVICE)
    return Estimate(
        device_peak_bytes=need.fixed_bytes + resident_bytes + residency.slot_count * residency.slot_bytes + need.activation_bytes,
        pinned_bytes=held[Tier.PINNED] + phase.ring_bytes,
        ram_bytes=held[Tier.RAM],
        disk_bytes=held[Tier.DISK],
        streamed_bytes=sum(moved.values()),
        transfer_s=_transfer_s(moved, machine),
    )


def _transfer_s(moved: dict[Tier, int], machine: Machine) -> float | None:
    """Seconds that the copies of one pass take one after the other; None where a rate is not known."""
    link_bytes, disk_bytes = moved[Tier.PINNED] + moved[Tier.RAM], moved[Tier.DISK]
    seconds = 0.0
    # What comes from disk also crosses the link, but behind a reader that is slower: the disk alone sets its time.
    for nbytes, rate in ((link_bytes, machine.rates.h2d_bytes_per_s), (disk_bytes, machine.rates.disk_bytes_per_s)):
        if nbytes and rate <= 0:
            return None
        seconds += nbytes / rate if nbytes else 0.0
    return seconds


def _whole_estimate(phases: Sequence[PhasePlan], together: int | None) -> Estimate:
    parts = [phase.estimate for phase in phases]
    times = [part.transfer_s for part in parts if part.transfer_s is not None]
    return Estimate(
        device_peak_bytes=max((part.device_peak_bytes for part in parts), default=0) if together is None else together,
        pinned_bytes=sum(part.pinned_bytes for part in parts),
        ram_bytes=sum(part.ram_bytes for part in parts),
        disk_bytes=sum(part.disk_bytes for part in parts),
        streamed_bytes=sum(part.streamed_bytes for part in parts),
        transfer_s=sum(times) if len(times) == len(parts) else None,
    )
