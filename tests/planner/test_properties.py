"""What holds for every plan."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import Plan
from overflowml_core.plan_check import held_bytes
from overflowml_core.planner import make_plan, smallest_budget_bytes
from tests.planner.build import GIB, MIB, component, granted, llm, machine, network

SIZE = st.integers(MIB, 400 * MIB)
SIZES = st.one_of(
    st.lists(SIZE, max_size=9),
    st.tuples(st.integers(1, 20), SIZE, st.integers(0, 20), SIZE).map(lambda t: [t[1]] * t[0] + [t[3]] * t[2]),
    st.tuples(st.integers(1, 60), SIZE).map(lambda t: [t[1]] * t[0]),
)
SOME = st.integers(0, 600 * MIB)


@st.composite
def networks(draw):
    count = draw(st.integers(1, 3))
    phases = draw(st.lists(st.sampled_from("ab"), min_size=count, max_size=count).map(sorted))
    parts = [
        component(f"part{i}", draw(SIZES), draw(SOME), draw(SOME), phase=phase, passes=draw(st.integers(1, 30)))
        for i, phase in enumerate(phases)
    ]
    return network(*parts)


@st.composite
def machines(draw):
    host, kind = draw(st.integers(0, 20 * GIB)), draw(st.sampled_from(["gpu", "unified", "cpu"]))
    pinnable = draw(st.integers(0, 10 * GIB))
    return machine(None if kind == "cpu" else 64 * GIB, 64 * GIB if kind == "cpu" else host, pinnable=pinnable, unified=kind == "unified")


def _plan(net, mach, nbytes, **changes) -> Plan | None:
    try:
        return make_plan(net, mach, Workload(), granted(max(nbytes, MIB), **changes))
    except DoesNotFit:
        return None


BUDGET = st.integers(MIB, 8 * GIB)


@settings(max_examples=150, deadline=None)
@given(networks(), machines(), BUDGET)
def test_never_over_any_budget(net, mach, nbytes):
    plan = _plan(net, mach, nbytes)
    if plan is None:
        assert nbytes < smallest_budget_bytes(net, mach, granted(nbytes))
        return
    assert held_bytes(plan) == plan.estimate.device_peak_bytes <= nbytes
    assert plan.estimate.pinned_bytes <= mach.host.pinnable_bytes
    assert plan.estimate.pinned_bytes + plan.estimate.ram_bytes <= plan.budget.host_bytes
    if mach.compute.unified:
        assert {p.home for p in plan.placements()} <= {Tier.DEVICE, Tier.DISK}
    for phase in plan.phases:
        assert phase.slot_count <= len(phase.streamed)
        assert all(p.tier is p.home for p in phase.streamed)


@settings(max_examples=150, deadline=None)
@given(networks(), machines(), BUDGET)
def test_each_block_placed_once_and_every_byte_has_a_home(net, mach, nbytes):
    plan = _plan(net, mach, nbytes)
    if plan is None:
        return
    assert [(p.component, p.block) for p in plan.placements()] == [(c.name, b.name) for c in net.components for b in c.blocks]
    assert sum(p.fixed_bytes + sum(q.stored_bytes for q in p.placements) for p in plan.phases) == sum(c.slab_bytes for c in net.components)
    assert plan.strategy == ("direct" if not plan.managed else "stream" if plan.estimate.streamed_bytes else "phased")
    named = [r.strategy for r in plan.rejected] + [plan.strategy]
    assert len(named) == len(set(named))
    assert {"direct", "phased", "stream"} <= set(named) <= {"direct", "phased", "stream", "sequential", "cpu"}
    if len(plan.phases) > 1 and plan.managed:
        assert not any(p.home is Tier.DEVICE and p.stored_bytes for p in plan.placements())


@settings(max_examples=200, deadline=None)
@given(networks(), machines(), BUDGET, BUDGET)
def test_more_device_memory_never_streams_more(net, mach, one, other):
    small, large = _plan(net, mach, min(one, other)), _plan(net, mach, max(one, other))
    if small is not None:
        assert large is not None
        assert large.estimate.streamed_bytes <= small.estimate.streamed_bytes


@settings(max_examples=60, deadline=None)
@given(networks(), machines(), BUDGET)
def test_same_input_same_plan_and_round_trip(net, mach, nbytes):
    plan = _plan(net, mach, nbytes)
    if plan is not None:
        again = _plan(net, mach, nbytes)
        assert again == plan
        assert again.fingerprint == plan.fingerprint
        back = Plan.from_json(plan.to_json())
        assert back == plan
        assert back.to_json() == plan.to_json()


@settings(max_examples=150, deadline=None)
@given(networks(), machines(), st.one_of(st.none(), st.integers(MIB, GIB)))
def test_smallest_budget_is_the_smallest(net, mach, reserve):
    smallest = smallest_budget_bytes(net, mach, Limits(reserve=reserve))
    if smallest < 2 * MIB:
        return
    reserve = None if reserve is None else min(reserve, smallest - MIB)
    smallest = smallest_budget_bytes(net, mach, Limits(reserve=reserve))
    if reserve is not None and reserve >= smallest - 1:
        return
    assert make_plan(net, mach, Workload(), granted(smallest, reserve=reserve)).estimate.device_peak_bytes <= smallest
    with pytest.raises(DoesNotFit) as caught:
        make_plan(net, mach, Workload(), granted(smallest - 1, reserve=reserve))
    message = str(caught.value)
    assert "\n" not in message
    needs = [miss.needed_bytes for miss in caught.value.near_misses]
    assert needs == sorted(needs)
    assert needs[0] == smallest
    size = re.search(r"overflow='(\w+)'", message)[1]
    make_plan(net, mach, Workload(), Limits(device_memory=size, reserve=reserve))


@settings(max_examples=80, deadline=None)
@given(networks(), BUDGET, st.integers(0, 20 * GIB), st.booleans())
def test_without_disk_nothing_is_on_disk(net, nbytes, host, unified):
    mach = machine(64 * GIB, host, unified=unified)
    plan = _plan(net, mach, nbytes, allow_disk=False)
    if plan is not None:
        assert plan.estimate.disk_bytes == 0
    if unified:
        smallest = smallest_budget_bytes(net, mach, granted(nbytes, allow_disk=False))
        assert (plan is not None) == (smallest <= nbytes)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 100), st.integers(3 * GIB, 20 * GIB))
def test_equal_blocks_are_spread_evenly(layers, nbytes):
    plan = _plan(llm(layers), machine(64 * GIB), nbytes)
    marks = "".join("R" if p.tier is Tier.DEVICE else "s" for p in plan.placements()) if plan else ""
    rarer = "R" if marks.count("R") <= marks.count("s") else "s"
    start = marks.find(rarer)
    if start < 0:
        return
    # Read round the end of the pass, where the next one begins.
    runs = [len(run) for run in (marks[start + 1 :] + marks[: start + 1]).split(rarer)[:-1]]
    assert max(runs) - min(runs) <= 1


@given(st.integers(9 * GIB, 60 * GIB), st.integers(40 * GIB, 90 * GIB))
def test_fingerprint_ignores_free_memory_that_changes_nothing(free, available):
    limits = Limits(device_memory="8GiB", host_memory="32GiB")
    here = make_plan(llm(), machine(), Workload(), limits)
    base = machine(pinnable=32 * GIB)
    other = replace(
        base,
        accelerators=(replace(base.accelerators[0], free_bytes=free, index=1),),
        host=replace(base.host, available_bytes=available),
    )
    there = make_plan(llm(), other, Workload(), limits)
    assert there.placements() == here.placements()
    assert there.fingerprint == here.fingerprint
