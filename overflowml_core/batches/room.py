"""Predicts how many items a batch may have on a managed pipeline: from its plan, and from its profile at two sizes."""

from __future__ import annotations

import logging
from dataclasses import replace

from overflowml_core import session
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Limits, Network, Workload
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.planner.needs import activation_bytes, phase_needs

_log = logging.getLogger("overflowml")


def most_that_fit(target: object, workload: Workload | None = None) -> int | None:
    """How many items at once stay within the plan at work, by the activations that are left free in each of its phases.

    Activations are taken to grow evenly from a batch of one to a batch of two and on. What really happens corrects the prediction.

    Args:
        target: a pipeline or model.
        workload: what it will be asked to do; that of its plan by default.

    Returns:
        At least 1; None where the target is not managed, or nobody can say what its batches take.
    """
    attachment = session.attachment(target)
    if attachment is None:
        return None
    plan = attachment.plan
    asked = workload or plan.workload
    try:
        one, two = (_activations(session.describe(target, replace(asked, batch=count)), plan) for count in (1, 2))
    except OverflowmlError as error:
        _log.info("%s: how much a batch takes cannot be predicted (%s); it is found out", plan.network, error)
        return None
    fits = [_most(_room_bytes(phase, plan), one[phase.name], two[phase.name]) for phase in plan.phases if phase.name in one]
    known = [count for count in fits if count is not None]
    return max(1, min(known)) if known else None


def _room_bytes(phase: PhasePlan, plan: Plan) -> int:
    return plan.budget.device_bytes - (phase.device_bytes - phase.activation_bytes)


def _activations(network: Network, plan: Plan) -> dict[str, int]:
    """Bytes of activations by phase, in the variant that the plan switched on; converted weights take theirs besides."""
    limits, found = Limits(), {}
    for need in phase_needs(network, limits):
        phase = next((one for one in plan.phases if one.name == need.name), None)
        if phase is None:
            continue
        profiles = tuple(
            next((variant.profiles for variant in component.variants if variant.name == phase.variant), component.profiles)
            for component in need.components
        )
        found[need.name] = activation_bytes(need.components, profiles, limits) + need.decoding_bytes
    return found


def _most(room_bytes: int, one_bytes: int, two_bytes: int) -> int | None:
    each_bytes = two_bytes - one_bytes
    if each_bytes <= 0:  # this phase does not depend on the batch, or nobody profiled it
        return None
    return 1 + (room_bytes - one_bytes) // each_bytes
