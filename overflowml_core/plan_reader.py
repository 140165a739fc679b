"""Reads plans back from JSON that may come from anywhere: bounded, typed, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from overflowml_core.errors import BadPlan, OverflowmlError
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.machine import ComputeRate, Rates
from overflowml_core.plan import (
    PLAN_SCHEMA,
    Avoided,
    Budget,
    Estimate,
    PassEstimate,
    PhasePlan,
    Placement,
    Plan,
    Rejected,
    WhatIf,
)

_LARGEST_PLAN_CHARS = 64 * 2**20
_LARGEST_COUNT = 2**60
_LONGEST_SECONDS = 2.0**100  # a power of two: an integer below it is no larger as a float
_FASTEST = 2.0**100
"""Of rates a second; like the longest time far beyond anything, and still a number to reckon with."""


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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LONGEST_SECONDS:
        raise BadPlan(f"plan: {what}={value!r} is not a time in seconds; make the plan again")
    return float(value)


def _share(value: object, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadPlan(f"plan: {what}={value!r} is no share from 0 to 1; make the plan again")
    return float(value)


def _rate(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _FASTEST:
        raise BadPlan(f"plan: {what}={value!r} is not a rate; make the plan again")
    return float(value)


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise BadPlan(f"plan: {what}={value!r} is not true or false; make the plan again")
    return value


def _texts(values: object, what: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise BadPlan(f"plan: {what} is not a list; make the plan again")
    return tuple(_text(value, what) for value in values)


_COUNTED = ("device_peak_bytes", "pinned_bytes", "ram_bytes", "disk_bytes", "streamed_bytes")
_TIMED = ("pass_s", "compute_s", "transfer_s", "stall_s")
_ANSWERED = ("total_s", "first_token_s", "token_s")


def _bound(value: object) -> str | None:
    return None if value is None else _text(value, "bound_by")


def _read_estimate(document: Mapping[str, Any]) -> Estimate:
    values: dict[str, Any] = {name: _count(document[name], name) for name in _COUNTED}
    values.update({name: _seconds(document[name], name) for name in (*_TIMED, *_ANSWERED)})
    return Estimate(**values, bound_by=_bound(document["bound_by"]))


def _read_pass(document: Mapping[str, Any]) -> PassEstimate:
    return PassEstimate(
        component=_text(document["component"], "component"),
        name=_text(document["name"], "pass"),
        count=_count(document["count"], "count"),
        activation_bytes=_count(document["activation_bytes"], "activation_bytes"),
        **{name: _seconds(document[name], name) for name in _TIMED},
        bound_by=_bound(document["bound_by"]),
        # Plans that were written before these were told have none of them.
        expert_bytes=_count(document.get("expert_bytes", 0), "expert_bytes"),
        missed_expert_bytes=_count(document.get("missed_expert_bytes", 0), "missed_expert_bytes"),
        expert_hit_rate=_share(document.get("expert_hit_rate"), "expert_hit_rate"),
    )


def _read_placement(document: Mapping[str, Any]) -> Placement:
    experts_home = document["experts_home"]
    return Placement(
        component=_text(document["component"], "component"),
        block=_text(document["block"], "block"),
        tier=Tier(document["tier"]),
        home=Tier(document["home"]),
        stored_bytes=_count(document["stored_bytes"], "stored_bytes"),
        format=_text(document["format"], "format"),
        device=_count(document["device"], "device"),
        experts_home=None if experts_home is None else Tier(experts_home),
    )


def _read_phase(document: Mapping[str, Any]) -> PhasePlan:
    return PhasePlan(
        name=_text(document["name"], "phase"),
        components=_texts(document["components"], "component"),
        fixed_bytes=_count(document["fixed_bytes"], "fixed_bytes"),
        fixed_home=Tier(document["fixed_home"]),
        staging_bytes=_count(document["staging_bytes"], "staging_bytes"),
        slot_bytes=_count(document["slot_bytes"], "slot_bytes"),
        activation_bytes=_count(document["activation_bytes"], "activation_bytes"),
        placements=tuple(_read_placement(p) for p in document["placements"]),
        estimate=_read_estimate(document["estimate"]),
        variant=_text(document["variant"], "variant"),
        expert_cache_bytes=_count(document["expert_cache_bytes"], "expert_cache_bytes"),
        passes=tuple(_read_pass(p) for p in document["passes"]),
    )


def _read_rejected(document: Mapping[str, Any]) -> Rejected:
    estimate = document["estimate"]
    return Rejected(
        strategy=_text(document["strategy"], "strategy"),
        reason=_text(document["reason"], "reason"),
        estimate=None if estimate is None else _read_estimate(estimate),
        viable=_flag(document["viable"], "viable"),
        quality=_text(document["quality"], "quality"),
        carried_out=_flag(document["carried_out"], "carried_out"),
    )


def _read_rates(document: Mapping[str, Any]) -> Rates:
    named = {f.name: f.type for f in fields(Rates)}
    return Rates(
        **{name: _rate(document[name], name) for name, kind in named.items() if kind == "float"},
        source=_text(document["source"], "source"),
        compute=tuple(
            ComputeRate(_text(r["kind"], "kind"), _text(r["dtype"], "dtype"), _rate(r["flop_per_s"], "flop_per_s"))
            for r in document["compute"]
        ),
        op_seconds=tuple((_text(signature, "signature"), _rate(seconds, "op_seconds")) for signature, seconds in document["op_seconds"]),
    )


def _read_budget(document: Mapping[str, Any]) -> Budget:
    return Budget(
        device_bytes=_count(document["device_bytes"], "device_bytes"),
        host_bytes=_count(document["host_bytes"], "host_bytes"),
        disk_bytes=_count(document["disk_bytes"], "disk_bytes"),
        each_bytes=tuple(_count(nbytes, "each_bytes") for nbytes in document["each_bytes"]),
    )


def _read_limits(document: Mapping[str, Any]) -> Limits:
    limits = dict(document)
    limits["excluded"] = frozenset((_text(f, "excluded"), _text(t, "excluded")) for f, t in limits["excluded"])
    for name in ("device_memory", "host_memory", "reserve"):
        if limits[name] is not None:
            _count(limits[name], name)
    return Limits.exactly(**limits)


def _read_document(document: Mapping[str, Any]) -> Plan:
    rates = document["rates"]
    return Plan(
        strategy=_text(document["strategy"], "strategy"),
        network=_text(document["network"], "network"),
        network_fingerprint=_text(document["network_fingerprint"], "network_fingerprint"),
        weight_bytes=_count(document["weight_bytes"], "weight_bytes"),
        device=_text(document["device"], "device"),
        device_name=_text(document["device_name"], "device_name"),
        workload=Workload(**document["workload"]),
        limits=_read_limits(document["limits"]),
        budget=_read_budget(document["budget"]),
        phases=tuple(_read_phase(p) for p in document["phases"]),
        estimate=_read_estimate(document["estimate"]),
        rejected=tuple(_read_rejected(r) for r in document["rejected"]),
        reasons=_texts(document["reasons"], "reasons"),
        quality=_text(document["quality"], "quality"),
        devices=_texts(document["devices"], "devices"),
        rates=None if rates is None else _read_rates(rates),
        traps=tuple(
            Avoided(_text(a["trap"], "trap"), _text(a["reason"], "reason"), _text(a["remedy"], "remedy")) for a in document["traps"]
        ),
        outlook=tuple(
            WhatIf(
                change=_text(w["change"], "change"),
                strategy=_text(w["strategy"], "strategy"),
                total_s=_seconds(w["total_s"], "total_s"),
                device_bytes=_count(w["device_bytes"], "device_bytes"),
            )
            for w in document["outlook"]
        ),
        schema=_count(document["schema"], "schema"),
        fingerprint=_text(document["fingerprint"], "fingerprint")[:64] or "missing",
    )
