"""Holds a plan against its own limits, whoever made it. Knows nothing of how plans are found."""

from __future__ import annotations

from overflowml_core.errors import BadPlan
from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan, Plan


def check_plan(plan: Plan) -> None:
    """Refuse a plan that contradicts itself.

    Raises:
        BadPlan: it is over its budget, a slot is too small, or a block stands twice or on a device that is not named.
    """
    seen: set[tuple[str, str]] = set()
    owners: set[str] = set()
    for phase in plan.phases:
        where = f"plan {plan.fingerprint}, phase {phase.name}"
        for component in phase.components:
            if component in owners:
                raise BadPlan(f"{where}: component {component} stands in two phases; each runs in one")
            owners.add(component)
        _check_placements(plan, phase, where, seen)
        for index, granted in enumerate(plan.budget.each_bytes):
            if phase.bytes_on(index) > granted:
                raise BadPlan(
                    f"{where}: takes {phase.bytes_on(index)} bytes of the {granted} on device {index}; it must not be over budget"
                )
    needed = held_bytes(plan)
    if needed > plan.budget.device_bytes:
        raise BadPlan(
            f"plan {plan.fingerprint}: takes {needed} bytes of a budget of {plan.budget.device_bytes}; it must not be over its own budget"
        )
    if plan.estimate.device_peak_bytes < needed:
        raise BadPlan(
            f"plan {plan.fingerprint}: predicts a peak of {plan.estimate.device_peak_bytes} bytes and takes {needed}; "
            "the prediction must cover it"
        )


def _check_placements(plan: Plan, phase: PhasePlan, where: str, seen: set[tuple[str, str]]) -> None:
    streams = False
    for placement in phase.placements:
        key = (placement.component, placement.block)
        if placement.component not in phase.components or key in seen:
            raise BadPlan(
                f"{where}: block {placement.component}.{placement.block} is placed twice or in a foreign phase; place each block once"
            )
        seen.add(key)
        if placement.device and placement.device >= len(plan.devices):
            raise BadPlan(f"{where}: block {placement.block} is on device {placement.device} of {len(plan.devices)}; name all devices")
        if placement.tier is not Tier.DEVICE:
            streams = True
            if placement.stored_bytes > phase.slot_bytes:
                raise BadPlan(
                    f"{where}: slots of {phase.slot_bytes} bytes, but block {placement.block} takes {placement.stored_bytes}; "
                    "make the slots as large as the largest streamed block"
                )
    if phase.staging_bytes < phase.slot_bytes or (streams and not phase.staging_bytes):
        raise BadPlan(
            f"{where}: {len(phase.streamed)} streamed blocks in slots of up to {phase.slot_bytes} bytes, and a staging buffer of "
            f"{phase.staging_bytes}; give it room for the largest at least"
        )


def held_bytes(plan: Plan) -> int:
    """Most bytes of the compute tier that the plan takes at any moment, all of its accelerators together.

    Phases of a direct plan are on the device together; otherwise they take turns.
    """
    per_phase = [phase.device_bytes for phase in plan.phases]
    if not per_phase:
        return 0
    if not plan.takes_turns:
        activations = max(phase.activation_bytes for phase in plan.phases)
        return sum(phase.device_bytes - phase.activation_bytes for phase in plan.phases) + activations
    return max(per_phase)
