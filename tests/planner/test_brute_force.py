"""The chosen plan against every other one of the same cost model, for networks small enough to try them all.

The brute force here shares the simulation of a phase with the planner and nothing else: it enumerates residencies, slots and formats
itself, with sizes and feasibility reckoned anew.
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits, Network, Workload
from overflowml_core.planner import make_plan
from overflowml_core.planner.cost import Costs
from overflowml_core.planner.machinery import Move
from overflowml_core.planner.needs import Recipe, phase_needs
from overflowml_core.planner.pace import Stage, pace_of
from overflowml_core.planner.rounds import rounds_of
from tests.planner.build import MIB, granted, network
from tests.planner.build_timed import DISK_BYTES_PER_S, FP8, INT4, INT8, LINK_BYTES_PER_S, ONE_DEVICE, RATES, on, timed

ORDER = ("lossless", "minimal", "any")
SIZE = st.integers(1, 40).map(lambda n: n * 4 * MIB)
SECONDS = st.integers(0, 20).map(lambda n: n * 0.01)


@st.composite
def parts(draw, name, most, linear):
    count = draw(st.integers(max(1, most - 3), most))
    sizes = draw(st.lists(SIZE, min_size=count, max_size=count))
    seconds = draw(st.lists(SECONDS, min_size=count, max_size=count))
    passes = draw(st.sampled_from([1, 2, 5, 30]))
    fixed, activations = draw(st.integers(0, 8)) * MIB, draw(st.integers(0, 8)) * MIB
    outside_s = draw(SECONDS)
    return timed(name, sizes, seconds, passes, linear=linear, outside_s=outside_s, fixed=fixed, activations=activations)


SHARE = st.integers(25, 110).map(lambda percent: percent / 100)
"""Of all bytes, what the budget is."""


def budget_of(net: Network, share: float) -> int:
    return max(MIB, int(share * sum(n.weight_bytes + n.activation_bytes for n in phase_needs(net, Limits()))))


def brute_phase(need, room, unified, takes_turns) -> float | None:
    """Least seconds of one phase over all residencies and staging buffers that hold consecutive blocks and not all of them."""
    rounds = rounds_of(need, Costs(RATES))
    rate = DISK_BYTES_PER_S if unified else LINK_BYTES_PER_S
    best = None
    for flags in product((False, True), repeat=len(need.sizes_bytes)):
        streamed = [size for size, stays in zip(need.sizes_bytes, flags, strict=True) if not stays]
        kept = sum(need.sizes_bytes) - sum(streamed)
        rows = [(streamed + streamed)[first : first + length] for first in range(len(streamed)) for length in range(1, len(streamed))]
        for staging_bytes in {sum(row) for row in rows} if streamed else [0]:
            if kept + staging_bytes > room or staging_bytes < max(streamed, default=0):
                continue
            numbers = iter(range(len(streamed)))
            slots = tuple(None if stays else (0, next(numbers)) for stays in flags)
            moves = tuple(Move(0.0, size / rate, nbytes=size) if unified else Move(size / rate, nbytes=size) for size in streamed)
            switch_s = (need.fixed_bytes + kept) / rate if takes_turns else 0.0
            seconds = pace_of(rounds, Stage(slots, (moves,), staging_bytes, in_ram=unified), switch_s, takes_turns).total_s
            best = seconds if best is None else min(best, seconds)
    return best


def brute(net: Network, budget: int, formats, unified) -> list[tuple[str, float]]:
    """(quality, least seconds) of the network as stored and in every format, for all components and for each phase alone."""
    found = []
    names = frozenset(c.name for c in net.components)
    for form in (None, *formats):
        heaviest = max(net.phases(), key=lambda phase: sum(c.weight_bytes for c in phase[1]))[1]
        for scope in {names, frozenset(c.name for c in heaviest)}:
            needs = phase_needs(net, Limits(), Recipe(form, scope))
            turns = len(needs) > 1
            together = sum(n.weight_bytes for n in needs) + max(n.activation_bytes for n in needs)
            quality = "lossless" if form is None else form.loss
            if together <= budget:
                found.append((quality, sum(r.count * r.compute_s for n in needs for r in rounds_of(n, Costs(RATES)))))
                continue
            phases = [brute_phase(n, budget - n.fixed_bytes - n.activation_bytes, unified, turns) for n in needs]
            if None not in phases:
                found.append((quality, sum(phases)))
    return found


def winner(found, quality) -> tuple[str, float] | None:
    """The least time, or the least lossy within 3 % of it."""
    allowed = [entry for entry in found if ORDER.index(entry[0]) <= ORDER.index(quality)]
    if not allowed:
        return None
    least = min(seconds for _, seconds in allowed)
    return min((entry for entry in allowed if entry[1] <= 1.03 * least), key=lambda entry: (ORDER.index(entry[0]), entry[1]))


def planned(net, mach, budget, **options):
    limits = granted(budget, quality=options.pop("quality", "minimal"))
    try:
        return make_plan(net, mach, Workload(), limits, options.pop("formats", ()), ONE_DEVICE)
    except DoesNotFit:
        return None


@settings(max_examples=200, deadline=None)
@given(parts("model", 6, False), SHARE, st.booleans())
def test_the_plan_of_one_phase_is_the_optimum(one, share, unified):
    net = network(one)
    budget = budget_of(net, share)
    plan = planned(net, on(device=2**40, unified=unified), budget)
    best = winner(brute(net, budget, (), unified), "minimal")
    assert (plan is None) == (best is None)
    if plan is not None:
        assert plan.estimate.total_s == pytest.approx(best[1])


@settings(max_examples=150, deadline=None)
@given(parts("model", 4, True), SHARE, st.sampled_from(ORDER), st.booleans())
def test_the_plan_with_formats_is_the_optimum(one, share, quality, unified):
    net, formats = network(one), (FP8, INT8, INT4)
    budget = budget_of(net, share)
    plan = planned(net, on(device=2**40, unified=unified), budget, formats=formats, quality=quality)
    best = winner(brute(net, budget, formats, unified), quality)
    assert (plan is None) == (best is None)
    if plan is not None:
        assert (plan.quality, plan.estimate.total_s) == (best[0], pytest.approx(best[1]))


@settings(max_examples=100, deadline=None)
@given(parts("encoder", 3, True), parts("model", 4, True), SHARE, st.booleans())
def test_the_plan_of_two_phases_is_the_optimum(encoder, model, share, unified):
    net, formats = network(encoder, model), (FP8,)
    budget = budget_of(net, share)
    plan = planned(net, on(device=2**40, unified=unified), budget, formats=formats)
    best = winner(brute(net, budget, formats, unified), "minimal")
    assert (plan is None) == (best is None)
    if plan is not None:
        assert (plan.quality, plan.estimate.total_s) == (best[0], pytest.approx(best[1]))


def test_no_phase_streams_through_a_buffer_that_holds_all_its_blocks():
    encoder, model = timed("encoder", [4 * MIB] * 2, [0.0] * 2), timed("model", [4 * MIB, 4 * MIB, 8 * MIB], [0.0, 0.01, 0.02], 30)
    plan = planned(network(encoder, model), on(device=2**40), 16 * MIB)
    assert [phase.staging_bytes for phase in plan.phases] == [0, 0]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(parts("model", 7, True), SHARE)
def test_the_plan_of_seven_blocks_is_the_optimum(one, share):
    net = network(one)
    budget = budget_of(net, share)
    plan = planned(net, on(device=2**40), budget, formats=(FP8,))
    best = winner(brute(net, budget, (FP8,), False), "minimal")
    assert (plan is None) == (best is None)
    if plan is not None:
        assert (plan.quality, plan.estimate.total_s) == (best[0], pytest.approx(best[1]))


@settings(max_examples=200, deadline=None)
@given(parts("encoder", 3, False), parts("model", 4, False), SHARE, SHARE, st.booleans())
def test_more_device_memory_is_never_slower(encoder, model, one, other, unified):
    net, mach = network(encoder, model), on(device=2**40, unified=unified)
    small, large = (planned(net, mach, budget_of(net, share)) for share in sorted((one, other)))
    if small is not None:
        assert large is not None
        assert large.estimate.total_s <= small.estimate.total_s * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(parts("model", 5, True), SHARE, SHARE)
def test_more_device_memory_costs_no_more_than_being_lossless(one, low, high):
    """With formats it may trade its 3 % for weights that stay as they are, and no more."""
    net, mach = network(one), on(device=2**40)
    small, large = (planned(net, mach, budget_of(net, share), formats=(FP8, INT8)) for share in sorted((low, high)))
    if small is not None:
        assert large.estimate.total_s <= small.estimate.total_s * 1.0301


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([8, 16, 24]), st.integers(1, 20)), min_size=8, max_size=24),
    st.sampled_from([1, 5, 30]),
    SHARE,
    SHARE,
    st.booleans(),
)
def test_more_device_memory_is_hardly_ever_slower_for_many_blocks(row, passes, one, other, turns):
    """Beyond what is enumerated a larger room may lead the search elsewhere; it may not lose more than 5 %."""
    encoder = [timed("encoder", [40 * MIB] * 8, [0.05] * 8)] if turns else []
    net = network(*encoder, timed("model", [size * MIB for size, _ in row], [n * 0.002 for _, n in row], passes))
    small, large = (planned(net, on(device=2**40), budget_of(net, share)) for share in sorted((one, other)))
    if small is not None:
        assert large.estimate.total_s <= small.estimate.total_s * 1.05
