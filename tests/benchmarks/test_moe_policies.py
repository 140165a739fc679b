"""Policies for a cache of experts, held against each other, against counting by hand, and against all that could be done."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_policies import LFU, LRFU, LRU, LRU2, Engines, Found, contestants, led, listed, optimum, table
from moe_trace import Pass, Trace, joined, overlap, popularity, zipf_exponent

EXPERTS = 4


def decoded(*banks_of_passes, tokens=1):
    """A trace whose passes ask for these experts, one token each unless told otherwise."""
    return Trace(EXPERTS, 2, tuple(Pass(tokens, tuple(dict.fromkeys(bank, 1) for bank in banks)) for banks in banks_of_passes))


banks = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=2)
passes = st.builds(lambda tokens, asked: Pass(tokens, (dict.fromkeys(asked, 1),)), st.sampled_from([1, 1, 1, 5]), banks)
traces = st.builds(lambda found: Trace(EXPERTS, 2, tuple(found)), st.lists(passes, min_size=1, max_size=9))


def most_hits(trace, slots):
    """By trying everything: after each step, whatever subset of what is there may be kept."""
    best = {frozenset(): 0}
    for step in trace.steps():
        after = {}
        for cached, hits in best.items():
            now = hits + (len(cached & step.given.keys()) if step.counts else 0)
            there = sorted(cached | step.given.keys())
            for size in range(min(slots, len(there)) + 1):
                for kept in combinations(there, size):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, -1), now)
        best = after
    return max(best.values())


@settings(max_examples=120, deadline=None)
@given(traces, st.integers(1, 3))
def test_the_optimum_is_what_trying_everything_finds(trace, slots):
    assert optimum(trace, slots).hits == most_hits(trace, slots)


@settings(max_examples=60, deadline=None)
@given(traces, st.integers(2, 4))
def test_no_policy_finds_more_than_the_optimum(trace, slots):
    best = optimum(trace, slots)
    for name, lead in contestants(trace, slots, before=trace).items():
        found = lead()
        assert found.requests == best.requests, name
        # The list may hold experts that nobody has asked for yet, which is no demand of the trace.
        assert found.hits <= best.hits or name == "a list from another text", name


def test_a_step_is_looked_up_before_it_brings_anything_in():
    trace = decoded([[0, 1]], [[1, 2]], [[0, 1]])
    assert led(trace, 2, LRU()) == Found(6, 2)  # 1 and 1; 0 has left for 2
    assert optimum(trace, 2) == Found(6, 3)  # keeps 0 and 1


def test_prefills_fill_the_cache_and_do_not_count():
    prompt = Pass(9, ({0: 5, 1: 4},))
    trace = Trace(EXPERTS, 2, (prompt, Pass(1, ({0: 1, 1: 1},)), prompt))
    assert led(trace, 2, LRU()) == Found(2, 2)


def test_who_leaves_by_each_policy():
    # 0 is used often and early, 1 twice and late, 2 once just now; 3 comes.
    trace = list(decoded([[0]], [[0]], [[0]], [[1]], [[1]], [[2]]).steps())
    leaves = {}
    for name, policy in (("lru", LRU()), ("lru2", LRU2()), ("lfu", LFU()), ("short", LRFU(0.1)), ("long", LRFU(1e6))):
        for step in trace:
            policy.saw(step)
        leaves[name] = policy.coldest({0, 1, 2})
    assert leaves == {"lru": 0, "lru2": 2, "lfu": 2, "short": 0, "long": 2}


def test_counts_are_halved_and_forgotten():
    trace = list(decoded([[0]], [[0]], [[0]], [[0]], [[1]]).steps())
    aged = LFU(half_every=2)
    for step in trace:
        aged.saw(step)
    assert aged.scores == {0: 2.25, 1: 1.0}  # 1; halved, and 1; 1; halved, and 1
    answer = LFU(of_answer=True)
    prompt = next(iter(Trace(EXPERTS, 2, (Pass(3, ({2: 3},)),)).steps()))
    for step in trace:
        answer.saw(step)
    answer.saw(prompt.__class__(prompt.given, 3, 8, False))
    assert answer.scores == {2: 3.0}


def test_the_list_stays_as_it_is():
    trace = decoded([[0, 1]], [[2, 3]], [[0, 1]])
    assert listed(trace, [2, 3]) == Found(6, 2)


def test_the_engines_policy_is_the_engines_own():
    trace = decoded(*[[[number % 3], [number % 2]] for number in range(40)])
    steps = list(trace.steps())
    policy = Engines(2, EXPERTS, 3)
    for step in steps:
        policy.saw(step)
    assert policy.half_life in (4.0, 16.0, 64.0, 256.0)
    assert policy.coldest({2, 1, 0}) == 1  # at step 39: 0 just now, 2 the step before, 1 two steps ago


def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = joined([decoded([[0, 1], [2]], [[3], [0]]), decoded([[1], [1]], tokens=7)])
    trace.write(tmp_path / "trace.json")
    assert Trace.read(tmp_path / "trace.json") == trace
    assert [step.now for step in trace.steps()] == [1, 1, 2, 2, 9, 9]
    assert [step.counts for step in trace.steps()] == [True] * 4 + [False] * 2


def test_the_exponent_of_an_exact_power_is_found():
    assert zipf_exponent([rank**-1.3 for rank in range(1, 129)]) == pytest.approx(1.3)


def test_popularity_and_overlap_by_hand():
    trace = decoded([[0, 1]], [[0, 2]], [[0, 2]])
    assert popularity(trace) == [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]
    assert overlap(trace) == 0.75


def test_the_table_has_a_row_for_each_policy():
    text = table(decoded([[0, 1]], [[0, 2]]), [1, 2])
    assert "| policy | 1 slots (25%) | 2 slots (50%) |" in text
    assert "| the optimum | 0.250 | 0.250 |" in text
