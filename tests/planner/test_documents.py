"""A plan as a document: any bytes give a plan or BadPlan, never another exception."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import BadPlan
from overflowml_core.facts import Limits, Workload
from overflowml_core.plan import Avoided, Plan
from overflowml_core.planner import make_plan, with_outlook
from tests.planner.build import GIB, component, llm, machine, network
from tests.planner.build_timed import FP8, ONE_DEVICE, mixture, on

PLAN = make_plan(
    network(component("text", [GIB] * 3, GIB), component("model", [GIB] * 6, GIB, GIB)),
    machine(7 * GIB, 6 * GIB),
    Workload(steps=4),
    Limits(),
)


def _told() -> Plan:
    """A plan with something in every field: passes, a format, experts, two devices, traps and an outlook."""
    net, mach = mixture(), on(device=2**30)
    asked = (net, mach, Workload(prompt_tokens=8), Limits(device_memory="440MiB"), (FP8,), ONE_DEVICE)
    plan = with_outlook(make_plan(*asked), *asked)
    trap = Avoided("a trap", "it would have hurt", "it does not")
    return replace(plan, traps=(trap,), devices=("cuda:0", "cuda:1"), fingerprint="")


TOLD = _told()
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["disk", "device", "pinned", "stream", 10**30])
)
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)


@st.composite
def mutated(draw):
    """A plan's document with one to three values replaced, removed or repeated."""
    document = json.loads(draw(st.sampled_from([PLAN, TOLD])).to_json())
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(["replace", "remove", "repeat"]))
            if action == "remove":
                del node[key]
            elif action == "repeat" and isinstance(node, list):
                node.append(node[key])
            else:
                node[key] = draw(VALUE)
            break
    return document


@settings(max_examples=300, deadline=None)
@given(st.binary() | st.text())
def test_any_text_is_a_plan_or_bad(text):
    with suppress(BadPlan):
        Plan.from_json(text)


@settings(max_examples=500, deadline=None)
@given(mutated(), st.booleans())
def test_mutated_document_is_a_plan_or_bad(document, trust_fingerprint):
    # With the fingerprint taken on trust every later check is reached, as by somebody who knows how to compute it.
    digest = (lambda plan: plan.fingerprint) if trust_fingerprint else Plan.digest
    with patch.object(Plan, "digest", digest), suppress(BadPlan):
        assert isinstance(Plan.from_json(json.dumps(document)), Plan)


def _document(**changes) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def _nested(depth: int) -> list:
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


@pytest.mark.parametrize("what", ["seconds", "nesting", "digits", "flag"])
def test_hostile_values_are_bad_plans(what):
    document = json.loads(PLAN.to_json())
    if what == "seconds":
        document["estimate"]["transfer_s"] = 10**400
    elif what == "nesting":
        document["limits"]["allow_disk"] = _nested(700)
    elif what == "flag":
        document["limits"]["allow_disk"] = "no"
    else:
        phase = replace(PLAN.phases[-1], staging_bytes=10**4200, slot_bytes=10**4200)
        document = json.loads(replace(PLAN, phases=(*PLAN.phases[:-1], phase), fingerprint="").to_json())
    with pytest.raises(BadPlan):
        Plan.from_json(json.dumps(document))


def test_a_plan_with_everything_survives_the_round_trip():
    assert TOLD.formats == ("fp8",)
    assert TOLD.outlook
    assert TOLD.phases[0].expert_cache_bytes
    assert Plan.from_json(TOLD.to_json()) == TOLD
    assert Plan.from_json(TOLD.to_json()).to_json() == TOLD.to_json()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 10**400, "1", True, None])
def test_rates_are_numbers(value):
    document = json.loads(TOLD.to_json())
    document["rates"]["memory_bytes_per_s"] = value
    with pytest.raises(BadPlan):
        Plan.from_json(json.dumps(document))


def test_a_plan_of_another_schema_says_so():
    with pytest.raises(BadPlan, match="schema 1, this version reads 3"):
        Plan.from_json(_document(schema=1))


def test_a_device_that_is_not_named_is_refused():
    phase = PLAN.phases[-1]
    placements = (*phase.placements[:-1], replace(phase.placements[-1], device=1))
    edited = replace(PLAN, phases=(*PLAN.phases[:-1], replace(phase, placements=placements)), fingerprint="")
    with pytest.raises(BadPlan, match="is on device 1 of 0"):
        edited.check()


def test_each_device_is_held_to_its_own_budget():
    each = replace(TOLD, budget=replace(TOLD.budget, each_bytes=(2**20, 2**40)), fingerprint="")
    with pytest.raises(BadPlan, match="on device 0"):
        each.check()


def test_words_and_predictions_are_no_part_of_the_decision():
    other = replace(TOLD, reasons=(), rejected=(), rates=None, outlook=(), traps=(), fingerprint="")
    assert other.fingerprint == TOLD.fingerprint
    assert replace(TOLD, quality="any", fingerprint="").fingerprint != TOLD.fingerprint


def test_small_reserve_survives_the_round_trip():
    plan = make_plan(llm(), machine(), Workload(), Limits(reserve="512KiB"))
    assert Plan.from_json(plan.to_json()) == plan


def test_edited_plan_is_refused():
    with pytest.raises(BadPlan, match="fingerprint"):
        Plan.from_json(_document(network_fingerprint="another"))
