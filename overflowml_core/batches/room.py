"""Predicts how many items a batch may have on a managed pipeline or model, from its plan alone."""

from __future__ import annotations

from overflowml_core.plan import PhasePlan, Plan


def most_that_fit(plan: Plan) -> int | None:
    """How many items at once stay within a plan, by what is left for activations in each of its phases.

    Activations are taken to grow no faster than the batch; what they take for the batch of the plan's workload is known. A batch of that
    size fits in any case, for it was planned for.

    Returns:
        At least the batch that was planned for; None where the plan keeps nothing for activations.
    """
    fits = [_room_bytes(phase, plan) * plan.workload.batch // phase.activation_bytes for phase in plan.phases if phase.activation_bytes]
    return max(plan.workload.batch, min(fits)) if fits else None


def _room_bytes(phase: PhasePlan, plan: Plan) -> int:
    """What activations may take in a phase: the budget without the weights and buffers that are on the device meanwhile."""
    phases = (phase,) if plan.takes_turns else plan.phases
    return plan.budget.device_bytes - sum(one.device_bytes - one.activation_bytes for one in phases)
