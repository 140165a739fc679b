"""Which plans a trial runs, held against a clock that the planner does not know: the simulation with other rates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import BadLimits, DoesNotFit
from overflowml_core.facts import ComputeRate, Limits, Machine, Network, Tier, Workload
from overflowml_core.measured import BlockTime, MeasuredPass
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from overflowml_core.planner.rebuild import drafts_behind, setting_behind
from overflowml_core.planner.splits import other_splits, split_of
from overflowml_core.planner.trial import CLOSE, MOST_PLANS, Contest, corrected, is_close
from tests.planner.build import MIB, component, granted, network
from tests.planner.build_timed import FLOP_PER_S, LINK_BYTES_PER_S, RATES, on, timed, work


def off(link: float, compute: float) -> Machine:
    """A machine whose calibration says so many times the true rates."""
    rates = replace(RATES, h2d_bytes_per_s=LINK_BYTES_PER_S * link, compute=(ComputeRate("matmul", "BF16", FLOP_PER_S * compute),))
    return on(rates, device=2**40, host=2**42)


def planned(net: Network, machine: Machine, budget_bytes: int) -> Plan | None:
    try:
        return make_plan(net, machine, Workload(), granted(budget_bytes))
    except DoesNotFit:
        return None


def truth(plan: Plan, net: Network, name: str) -> tuple[MeasuredPass, float]:
    """What a stopwatch would say of a pass under a plan, and seconds of the whole phase, both by the true rates."""
    setting = setting_behind(plan, net, off(1, 1))
    turns = len(plan.phases) > 1
    index = next(i for i, phase in enumerate(plan.phases) if name in phase.components)
    draft, homes = drafts_behind(plan, net, ())[index]
    split = split_of(draft, homes, setting, turns)
    (one,) = [p for p in split.forecast.passes if p.component == name]
    (part,) = [part for r in setting.rounds(draft.need) for part in r.parts if part.component == name]
    blocks = [block.name for component, block in draft.need.blocks if component == name]
    times = tuple(BlockTime(block, seconds, 1) for block, seconds in zip(blocks, part.seconds, strict=False))
    streamed = any(place.tier is Tier.PINNED for place in plan.phases[index].placements)
    rate = LINK_BYTES_PER_S if streamed else 0.0
    return MeasuredPass(name, 2, one.pass_s, part.seconds[-1], one.stall_s, times, rate), split.total_s


def tried(plan: Plan, net: Network, machine: Machine, name: str) -> tuple[Contest, list[Plan]]:
    """A whole trial, with the plans that it ran."""
    contest, ran = Contest(plan, net, machine), []
    while name in contest.components:
        ran.append(contest.plan)
        contest.hear(truth(contest.plan, net, name)[0])
    return contest, ran


FACTOR = st.floats(0.3, 3.0)
ROW = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=3, max_size=6)


@settings(max_examples=40, deadline=None)
@given(ROW, st.integers(25, 95), FACTOR, FACTOR)
def test_the_kept_plan_is_within_five_percent_of_the_best_split(row, percent, link, compute):
    sizes, seconds = [size * 4 * MIB for size, _ in row], [0.01 * n for _, n in row]
    net = network(timed("model", sizes, seconds, passes=30))
    plan = planned(net, off(link, compute), sum(sizes) * percent // 100)
    if plan is None or plan.kind not in ("stream", "sequential"):
        return
    contest, ran = tried(plan, net, off(link, compute), "model")
    best = planned(net, off(1, 1), plan.budget.device_bytes)
    assert len(ran) <= MOST_PLANS
    assert truth(contest.plan, net, "model")[1] <= 1.05 * best.estimate.total_s
    assert contest.plan.check().budget == plan.budget


@settings(max_examples=20, deadline=None)
@given(ROW, ROW, st.integers(40, 95), FACTOR, FACTOR)
def test_phases_that_take_turns_keep_their_homes_and_get_no_slower(first, second, percent, link, compute):
    parts = [([s * 4 * MIB for s, _ in row], [0.01 * n for _, n in row]) for row in (first, second)]
    net = network(timed("a", *parts[0], passes=3), timed("b", *parts[1], passes=30))
    plan = planned(net, off(link, compute), max(sum(sizes) for sizes, _ in parts) * percent // 100)
    if plan is None or plan.kind not in ("stream", "sequential", "phased"):
        return
    before = [truth(plan, net, name)[1] for name in ("a", "b")]
    contest = Contest(plan, net, off(link, compute))
    while contest.components:
        name = min(contest.components)
        contest.hear(truth(contest.plan, net, name)[0])
    after = [truth(contest.plan, net, name)[1] for name in ("a", "b")]
    assert sum(after) <= sum(before) * (1 + 1e-9)
    assert [p.home for p in contest.plan.placements()] == [p.home for p in plan.placements()]
    assert contest.plan.check().budget == plan.budget


def uneven() -> Network:
    """Two blocks that compute long, and four that do not: which of them stay depends on how fast the link is."""
    return network(timed("model", [40 * MIB] * 6, [0.2, 0.01, 0.01, 0.2, 0.01, 0.01], passes=30))


def test_what_was_measured_is_told():
    net, machine = uneven(), off(3, 0.3)
    plan = planned(net, machine, 170 * MIB)
    contest, ran = tried(plan, net, machine, "model")
    (told,) = contest.sentences()
    assert told.startswith("model: measured, ")
    assert told in contest.plan.reasons
    assert told.count("a pass with") == len(ran)
    assert "model: measured, " in contest.plan.summary()
    assert contest.pass_s == truth(contest.plan, net, "model")[0].pass_s


def test_the_corrected_prediction_is_what_was_measured():
    net, machine = uneven(), off(0.3, 3)
    contest, _ = tried(planned(net, machine, 170 * MIB), net, machine, "model")
    measured, _ = truth(contest.plan, net, "model")
    assert contest.plan.estimate.pass_s == pytest.approx(measured.pass_s)
    assert contest.plan.rates.h2d_bytes_per_s == LINK_BYTES_PER_S


def test_a_model_that_is_wrong_has_its_second_best_run_too():
    """The measured pass takes a fifth longer than any rate explains: what is predicted to be a little slower may be faster."""
    net, machine = uneven(), off(1, 1)
    plan = planned(net, machine, 170 * MIB)
    exact = Contest(plan, net, machine)
    measured, _ = truth(plan, net, "model")
    assert exact.hear(measured) == exact.plan
    assert exact.components == frozenset()
    doubtful = Contest(plan, net, machine)
    following = doubtful.hear(replace(measured, pass_s=1.2 * measured.pass_s))
    assert following.placements() != plan.placements() or following.phases[0].staging_bytes != plan.phases[0].staging_bytes
    # It turns out to be slower: the first one is kept.
    while doubtful.components:
        doubtful.hear(replace(measured, pass_s=2 * measured.pass_s))
    assert doubtful.plan.placements() == plan.placements()


def test_a_plan_that_could_not_be_run_ends_the_trial():
    net, machine = uneven(), off(1, 1)
    plan = planned(net, machine, 170 * MIB)
    contest = Contest(plan, net, machine)
    measured, _ = truth(plan, net, "model")
    contest.hear(replace(measured, pass_s=1.2 * measured.pass_s))
    contest.refuse(plan)
    assert (contest.plan, contest.components) == (plan, frozenset())


def test_a_trial_that_is_closed_keeps_the_fastest_so_far():
    net, machine = uneven(), off(1, 1)
    plan = planned(net, machine, 170 * MIB)
    contest = Contest(plan, net, machine)
    measured, _ = truth(plan, net, "model")
    contest.hear(replace(measured, pass_s=1.2 * measured.pass_s))
    assert contest.close().placements() == plan.placements()
    assert contest.components == frozenset()


def test_a_model_that_nobody_profiled_is_tried_by_what_is_measured():
    net = network(component("model", [40 * MIB] * 6))
    plan = planned(net, off(1, 1), 170 * MIB)
    assert not is_close(plan, net, off(1, 1))
    contest = Contest(plan, net, off(1, 1))
    times = tuple(BlockTime(f"layers.{i}", s, 1) for i, s in enumerate([0.2, 0.01, 0.01, 0.2, 0.01, 0.01]))
    contest.hear(MeasuredPass("model", 2, 1.0, 0.0, 0.5, times, LINK_BYTES_PER_S))
    assert contest.plan.estimate.pass_s is not None


def test_close_is_a_quarter():
    net = uneven()
    plan = planned(net, off(1, 1), 170 * MIB)
    setting = setting_behind(plan, net, off(1, 1))
    ((draft, homes),) = drafts_behind(plan, net, ())
    second = min(split.total_s for split in other_splits(draft, homes, setting, False))
    assert is_close(plan, net, off(1, 1)) == (second <= CLOSE * plan.estimate.total_s)
    # Two blocks of which one stays: there is nothing else to do with the room.
    single = network(timed("model", [40 * MIB, 4 * MIB], [0.1, 0.1], passes=30))
    assert not is_close(planned(single, off(1, 1), 43 * MIB), single, off(1, 1))


def test_direct_plans_are_left_alone():
    net = uneven()
    plan = planned(net, off(1, 1), 2**30)
    assert plan.kind == "direct"
    assert Contest(plan, net, off(1, 1)).components == frozenset()


# ---- what the calibration learns


def lesson(**changes) -> MeasuredPass:
    return replace(MeasuredPass("model", 2, 1.0, 0.0, 0.5, (), 2 * LINK_BYTES_PER_S), **changes)


def test_rates_that_were_measured_are_corrected_within_bounds():
    net = uneven()
    assert corrected(RATES, net, [lesson()]).h2d_bytes_per_s == 2 * LINK_BYTES_PER_S
    assert corrected(RATES, net, [lesson(h2d_bytes_per_s=100 * LINK_BYTES_PER_S)]).h2d_bytes_per_s == 5 * LINK_BYTES_PER_S
    assert corrected(RATES, net, [lesson(h2d_bytes_per_s=0.01 * LINK_BYTES_PER_S)]).h2d_bytes_per_s == 0.2 * LINK_BYTES_PER_S
    assert corrected(RATES, net, [lesson(h2d_bytes_per_s=1.02 * LINK_BYTES_PER_S)]) is RATES
    assert corrected(RATES, net, [lesson(h2d_bytes_per_s=0.0)]) is RATES
    assert corrected(RATES, net, []) is RATES


def test_operations_are_corrected_where_computing_set_the_time():
    named = replace(work(0.1), signature="mm")
    made = timed("model", [40 * MIB] * 2, [0.1, 0.1])
    (profile,) = made.profiles
    blocks = tuple(replace(block, works=(named,)) for block in profile.blocks)
    net = network(replace(made, profiles=(replace(profile, blocks=blocks),)))
    rates = replace(RATES, op_seconds=(("mm", 0.1), ("other", 0.7)))
    times = (BlockTime("layers.0", 0.15, 1), BlockTime("layers.1", 0.15, 1))
    bound = lesson(stall_s=0.0, h2d_bytes_per_s=0.0, blocks=times)
    assert corrected(rates, net, [bound]).op_seconds == (("mm", pytest.approx(0.15)), ("other", 0.7))
    assert corrected(rates, net, [replace(bound, stall_s=0.5)]) is rates
    assert corrected(rates, replace(net, components=()), [bound]) is rates


# ---- the wish


def test_the_wish_for_a_trial_is_read_and_is_no_part_of_the_decision():
    net, machine = uneven(), off(1, 1)
    plans = [make_plan(net, machine, Workload(), granted(170 * MIB, trial=wish)) for wish in (None, True, False)]
    assert len({plan.fingerprint for plan in plans}) == 1
    for plan in plans:
        assert Plan.from_json(plan.to_json()).limits.trial is plan.limits.trial
    before = json.loads(plans[0].to_json())
    del before["limits"]["trial"]
    assert Plan.from_json(json.dumps(before)) == plans[0]
    with pytest.raises(BadLimits, match="trial='yes'"):
        Limits(trial="yes")
