"""Plans of a line each, also such as no planner makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from overflowml_core.facts import Block, Component, Limits, Machine, Network, Tier, Workload
from overflowml_core.plan import Budget, Estimate, PhasePlan, Placement, Plan
from tests.planner.build import GIB, MIB, component, machine, network

__all__ = ["GIB", "MIB", "block_changes", "component", "machine", "network", "on", "phase", "plan", "with_accelerator"]


def phase(part: Component, *, resident: int | None = None, home: Tier = Tier.PINNED, format: str = "", **changes: Any) -> PhasePlan:
    """A phase of one component, with its first ``resident`` blocks on the device (all where None) and the others streamed from ``home``."""
    placements = []
    for index, block in enumerate(part.blocks):
        stays = resident is None or index < resident
        where = Tier.DEVICE if stays else home
        stored = block.slab_bytes // 2 if format else block.slab_bytes
        placements.append(Placement(part.name, block.name, where, Tier.DEVICE if resident is None else home, stored, format))
    slot = max((p.stored_bytes for p in placements if p.tier is not Tier.DEVICE), default=0)
    made = PhasePlan(
        name=part.phase,
        components=(part.name,),
        fixed_bytes=part.resident_bytes,
        fixed_home=Tier.DEVICE,
        staging_bytes=2 * slot,
        slot_bytes=slot,
        activation_bytes=part.activation_bytes,
        placements=tuple(placements),
        estimate=Estimate(),
    )
    return replace(made, **changes)


def plan(net: Network, *phases: PhasePlan, budget: int, strategy: str = "stream", on: Machine | None = None, **changes: Any) -> Plan:
    """A plan of these phases, unchecked."""
    where = (on or machine()).compute
    made = Plan(
        strategy=strategy,
        network=net.class_name,
        network_fingerprint=net.fingerprint,
        weight_bytes=net.weight_bytes,
        device=where.torch_name,
        device_name=where.name,
        workload=Workload(),
        limits=Limits(),
        budget=Budget(budget, 64 * GIB, 2**42),
        phases=phases,
        estimate=Estimate(device_peak_bytes=2**42),
    )
    return replace(made, **changes)


def block_changes(part: Component, index: int, **changes: Any) -> Component:
    """The component with one of its blocks changed."""
    blocks: list[Block] = list(part.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return replace(part, blocks=tuple(blocks))


def on(*words: str, **options: Any) -> Machine:
    """A machine in an environment of these words."""
    return replace(machine(**options), environment=frozenset(words))


def with_accelerator(found: Machine, **changes: Any) -> Machine:
    """The machine with its first accelerator changed."""
    return replace(found, accelerators=(replace(found.accelerators[0], **changes), *found.accelerators[1:]))
