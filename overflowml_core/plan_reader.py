"""Reads plans back from JSON that may come from anywhere: bounded, typed, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from overflowml_core.errors import BadPlan, OverflowmlError
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import PLAN_SCHEMA, Budget, Estimate, PhasePlan, Placement, Plan, Rejected

_LARGEST_PLAN_CHARS = 64 * 2**20
_LARGEST_COUNT = 2**60
_LONGEST_SECONDS = 1e12


def read_plan(text: str | bytes) -> Plan:
    """The plan in a JSON text, not yet held against its own limits.

    Raises:
        BadPlan: the text is no plan of this version, or was edited.
    """
    if len(text) > _LARGEST_PLAN_CHARS:
        raise BadPlan(f"plan: {len(text)} characters; no plan is longer than {_LARGEST_PLAN_CHARS}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPlan(f"plan: not JSON ({error}); write one with 'overflowml plan SOURCE --json'") from None
    if not isinstance(document, dict) or document.get("schema") != PLAN_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise BadPlan(f"plan: schema {found!r}, this version reads {PLAN_SCHEMA}; make the plan again with this version")
    try:
        plan = _read_document(document)
        belongs = plan.fingerprint == plan.digest()
    except BadPlan:
        raise
    except (OverflowmlError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadPlan(f"plan: malformed ({type(error).__name__}: {error}); make the plan again") from None
    if not belongs:
        raise BadPlan(f"plan: fingerprint {plan.fingerprint!r} does not belong to its contents; it was edited: make the plan again")
    return plan


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        shown = repr(value) if not isinstance(value, int) or abs(value) <= _LARGEST_COUNT else "a number without end"
        raise BadPlan(f"plan: {what}={shown} is not a whole number from 0 to 2**60; make the plan again")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise BadPlan(f"plan: {what}={value!r} is not text; make the plan again")
    return value


def _seconds(value: object, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LONGEST_SECONDS:
        raise BadPlan(f"plan: {what}={value!r} is not a time in seconds; make the plan again")
    return float(value)


def _read_estimate(document: Mapping[str, Any]) -> Estimate:
    bound = document["bound_by"]
    return Estimate(
        device_peak_bytes=_count(document["device_peak_bytes"], "device_peak_bytes"),
        pinned_bytes=_count(document["pinned_bytes"], "pinned_bytes"),
        ram_bytes=_count(document["ram_bytes"], "ram_bytes"),
        disk_bytes=_count(document["disk_bytes"], "disk_bytes"),
        streamed_bytes=_count(document["streamed_bytes"], "streamed_bytes"),
        pass_s=_seconds(document["pass_s"], "pass_s"),
        compute_s=_seconds(document["compute_s"], "compute_s"),
        transfer_s=_seconds(document["transfer_s"], "transfer_s"),
        stall_s=_seconds(document["stall_s"], "stall_s"),
        bound_by=None if bound is None else _text(bound, "bound_by"),
    )


def _read_phase(document: Mapping[str, Any]) -> PhasePlan:
    return PhasePlan(
        name=_text(document["name"], "phase"),
        components=tuple(_text(c, "component") for c in document["components"]),
        fixed_bytes=_count(document["fixed_bytes"], "fixed_bytes"),
        fixed_home=Tier(document["fixed_home"]),
        slot_count=_count(document["slot_count"], "slot_count"),
        slot_bytes=_count(document["slot_bytes"], "slot_bytes"),
        activation_bytes=_count(document["activation_bytes"], "activation_bytes"),
        placements=tuple(
            Placement(
                component=_text(p["component"], "component"),
                block=_text(p["block"], "block"),
                tier=Tier(p["tier"]),
                home=Tier(p["home"]),
                stored_bytes=_count(p["stored_bytes"], "stored_bytes"),
            )
            for p in document["placements"]
        ),
        estimate=_read_estimate(document["estimate"]),
    )


def _read_document(document: Mapping[str, Any]) -> Plan:
    limits = dict(document["limits"])
    limits["excluded"] = frozenset((_text(f, "excluded"), _text(t, "excluded")) for f, t in limits["excluded"])
    for name in ("device_memory", "host_memory", "reserve"):
        if limits[name] is not None:
            _count(limits[name], name)
    budget = document["budget"]
    return Plan(
        strategy=_text(document["strategy"], "strategy"),
        network=_text(document["network"], "network"),
        network_fingerprint=_text(document["network_fingerprint"], "network_fingerprint"),
        weight_bytes=_count(document["weight_bytes"], "weight_bytes"),
        device=_text(document["device"], "device"),
        device_name=_text(document["device_name"], "device_name"),
        workload=Workload(**document["workload"]),
        limits=Limits.exactly(**limits),
        budget=Budget(**{n: _count(budget[n], n) for n in ("device_bytes", "host_bytes", "disk_bytes")}),
        phases=tuple(_read_phase(p) for p in document["phases"]),
        estimate=_read_estimate(document["estimate"]),
        rejected=tuple(
            Rejected(
                _text(r["strategy"], "strategy"),
                _text(r["reason"], "reason"),
                _read_estimate(r["estimate"]) if r["estimate"] is not None else None,
            )
            for r in document["rejected"]
        ),
        reasons=tuple(_text(r, "reasons") for r in document["reasons"]),
        schema=_count(document["schema"], "schema"),
        fingerprint=_text(document["fingerprint"], "fingerprint") or "missing",
    )
