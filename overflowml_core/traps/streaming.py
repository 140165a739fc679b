"""Traps of placement: components and activations that do not fit, copies that gain nothing, memory that cannot be pinned."""

from __future__ import annotations

from overflowml_core.facts import Component, Machine, Network, Tier
from overflowml_core.formats import AS_STORED
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.traps.trap import Step, Trap
from overflowml_core.units import format_bytes

_OUTSIDE = (Tier.PINNED, Tier.RAM)


def weights_bytes(component: Component) -> int:
    """Bytes of a component on the device when all of it is there, blocks that are tied to another once."""
    return component.resident_bytes + sum(block.slab_bytes for block in component.blocks if block.tied_to is None)


def _whole(phase: PhasePlan) -> bool:
    """Whether the phase has all of its weights on the device as they are stored."""
    return not phase.streamed and phase.expert_cache_bytes == 0 and all(p.format == AS_STORED for p in phase.placements)


def _in_phase(phase: PhasePlan, network: Network) -> tuple[Component, ...]:
    return tuple(component for component in network.components if component.name in phase.components)


# ---- a component that is larger than the device


def _component_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if len(plan.devices) > 1:
        return None
    for phase in filter(_whole, plan.phases):
        needed = sum(map(weights_bytes, _in_phase(phase, network)))
        if needed > plan.budget.device_bytes:
            reason = f"{phase.name} is to be on the device as a whole: {format_bytes(needed)} in {format_bytes(plan.budget.device_bytes)}"
            return Step((("strategy", plan.strategy),), reason)
    return None


def _component_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    if len(network.components) < 2:
        return ""
    largest = max(network.components, key=weights_bytes)
    needed = weights_bytes(largest)
    if needed <= plan.budget.device_bytes:
        return ""
    return (
        f"{largest.name} has {format_bytes(needed)} of weights for {format_bytes(plan.budget.device_bytes)} of device memory: "
        "moving whole components would run out of memory"
    )


# ---- activations that nobody kept room for


def _activations_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if plan.limits.reserve_bytes is not None:  # as asked
        return None
    for phase in plan.phases:
        known = [component for component in _in_phase(phase, network) if component.activation_bytes]
        if known and phase.activation_bytes == 0:
            reason = f"{phase.name} keeps nothing free for {format_bytes(known[0].activation_bytes)} of activations of {known[0].name}"
            return Step((("strategy", plan.strategy),), reason)
    return None


def _activations_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    budget = plan.budget.device_bytes
    for phase in plan.phases:
        needed = sum(map(weights_bytes, _in_phase(phase, network)))
        if not phase.variant and needed <= budget < needed + phase.activation_bytes:
            return (
                f"the weights of {phase.name} ({format_bytes(needed)}) would fill {format_bytes(budget)} and leave no room for "
                f"{format_bytes(phase.activation_bytes)} of activations and caches"
            )
    return ""


# ---- memory that is the device's own


def _unified_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if not machine.compute.unified:
        return None
    if any(p.home in _OUTSIDE for p in plan.placements()) or any(phase.fixed_home in _OUTSIDE for phase in plan.phases):
        names = tuple(sorted({p.format for p in plan.placements()} | {AS_STORED}))
        reason = f"weights that wait in RAM take the memory that {machine.compute.name} computes in, and are there twice when they run"
        return Step(tuple((name, tier.value) for name in names for tier in _OUTSIDE), reason)
    return None


def _unified_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    if not machine.accelerators or not machine.compute.unified or not plan.managed:
        return ""
    return f"{machine.compute.name} computes in the system's own memory: offload to RAM would free nothing and hold weights twice"


# ---- more pinned memory than may be pinned


def _pinned_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    pinned = plan.estimate.pinned_bytes
    if pinned <= machine.host.pinnable_bytes:
        return None
    names = sorted({p.format for p in plan.placements()} | {AS_STORED})
    reason = f"{format_bytes(pinned)} are to be page-locked, and the system can spare {format_bytes(machine.host.pinnable_bytes)}"
    return Step(tuple((name, Tier.PINNED.value) for name in names), reason)


def _pinned_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    # What a host that pins everything it offloads would lock: all that waits outside the device.
    waiting = sum(p.stored_bytes for p in plan.placements() if p.home is not Tier.DEVICE)
    waiting += sum(phase.fixed_bytes for phase in plan.phases if phase.fixed_home is not Tier.DEVICE)
    if machine.compute.unified or waiting <= machine.host.pinnable_bytes:
        return ""
    return (
        f"{format_bytes(waiting)} wait outside the device, and only {format_bytes(machine.host.pinnable_bytes)} of RAM may be page-locked"
    )


# ---- routed experts


def _cache_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    for phase in plan.phases:
        banks = [block.experts for component in _in_phase(phase, network) for block in component.blocks if block.experts is not None]
        floor = 2 * max((bank.nbytes for bank in banks if bank.separable), default=0)
        if 0 < phase.expert_cache_bytes < floor:
            reason = (
                f"{phase.name}: a cache of {format_bytes(phase.expert_cache_bytes)} does not hold two experts, "
                f"{format_bytes(floor)}: each one would wait for the one before it to leave"
            )
            return Step((("strategy", plan.strategy),), reason)
    return None


def _experts_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    if not any(phase.expert_cache_bytes for phase in plan.phases):
        return ""
    banks = [block.experts for component in network.components for block in component.blocks if block.experts is not None]
    whole, used = sum(bank.count * bank.nbytes for bank in banks), sum(bank.per_token * bank.nbytes for bank in banks)
    return f"offloading layers as they are would move {format_bytes(whole)} of experts for a token that uses {format_bytes(used)}"


TRAPS: tuple[Trap, ...] = (
    Trap(
        name="component-larger-than-device",
        kind="plan",
        applies_when="a pipeline is offloaded by whole components and one of them is larger than the device's memory",
        symptom="out of memory as soon as that component is called, though the tool that chose the offload predicted that it fits",
        what_we_do="a phase that does not fit as a whole is streamed block by block; no plan holds more on the device than its budget",
        evidence=("diffusers #10999", "diffusers 0.42.1 pipelines/pipeline_utils.py, enable_model_cpu_offload"),
        step=_component_step,
        relevance=_component_relevance,
    ),
    Trap(
        name="activations-left-out",
        kind="plan",
        applies_when="weights are placed by their own size until the device is full (device_map='auto')",
        symptom="the model loads, and the first image or a long prompt runs out of memory",
        what_we_do="activations and caches at the workload are part of the budget of every phase",
        evidence=("accelerate #608", "transformers 5.23.0 integrations/accelerate.py, _get_device_map"),
        step=_activations_step,
        relevance=_activations_relevance,
    ),
    Trap(
        name="unified-memory-offload",
        kind="plan",
        applies_when="weights are offloaded to RAM on a device that computes in RAM: Apple silicon, integrated GPUs, the CPU itself",
        symptom="twice the memory and a copy in each pass, and nothing is freed",
        what_we_do="on such a device weights are either resident or read from disk; they never wait in RAM",
        evidence=("pytorch #140787", "diffusers #4197"),
        step=_unified_step,
        relevance=_unified_relevance,
    ),
    Trap(
        name="pinned-past-limit",
        kind="plan",
        applies_when="everything that is offloaded is page-locked, whatever the system can spare",
        symptom="the system swaps or kills the process; on Windows the driver refuses beyond its share",
        what_we_do="at most what the system can spare is pinned; the rest waits in pageable RAM or stays on disk",
        evidence=("diffusers #11106", "ComfyUI comfy/model_management.py, MAX_PINNED_MEMORY"),
        step=_pinned_step,
        relevance=_pinned_relevance,
    ),
    Trap(
        name="expert-cache-too-small",
        kind="plan",
        applies_when="routed experts are cached on the device in fewer slots than one token uses, and the latest ones are kept",
        symptom="no hit at all, and slower than without a cache",
        what_we_do="what is used most stays, whatever comes in between, and slots are for all layers together; a plan whose cache does not "
        "hold two experts is refused",
        evidence=("kekzl/imp #1365", "kekzl/imp #1375"),
        step=_cache_step,
    ),
    Trap(
        name="experts-moved-whole",
        kind="plan",
        applies_when="layers with stacked experts are offloaded parameter by parameter (accelerate's hooks on transformers 5)",
        symptom="every token moves all experts of a layer, of which it uses a few: 16 times the bytes with 64 experts and 4 used",
        what_we_do="where a plan offloads experts, they are copied one by one as they are routed to",
        evidence=("accelerate 1.15.0 hooks.py, AlignDevicesHook", "transformers 5.23.0 integrations/moe.py"),
        relevance=_experts_relevance,
    ),
)
"""Traps of placement. Their numbers are those of the plan at hand."""
