"""Who stays in a cache of experts: scores against their definition, the coldest against a search of all, ghosts against plain caches."""

from __future__ import annotations

import math
import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.runtime.experts.policy import HALF_LIVES, Ghost, Ghosts, Ranking, Scores, warmest

uses = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60)


@given(uses, st.sampled_from(HALF_LIVES))
def test_a_score_is_the_sum_of_faded_uses(history: list[tuple[int, int]], half_life: float) -> None:
    scores, times, now = Scores(6, half_life), {e: [] for e in range(6)}, 0  # all other half-lives beside it
    for expert, step in history:
        now += step
        scores.touch(expert, 1, 1, now)
        times[expert].append(now)
    for expert, used in times.items():
        exact = sum(2.0 ** ((t - now) / half_life) for t in used)
        found = 2.0 ** (scores.levels[expert] - now / half_life)
        assert found == pytest.approx(exact, rel=1e-9, abs=1e-15)


@given(st.integers(2, 500), st.sampled_from(HALF_LIVES))
def test_a_pass_of_many_tokens_counts_as_spread_over_it(tokens: int, half_life: float) -> None:
    at_once, one_by_one = Scores(1, half_life, ()), Scores(1, half_life, ())
    at_once.touch(0, tokens, tokens, tokens)
    for now in range(1, tokens + 1):
        one_by_one.touch(0, 1, 1, now)
    # An integral in place of a sum over whole tokens.
    assert abs(at_once.levels[0] - one_by_one.levels[0]) <= 0.5 / half_life + 1e-9


@settings(max_examples=50)
@given(uses, st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_the_coldest_has_the_lowest_score(history: list[tuple[int, int]], cached: set[int], held: set[int]) -> None:
    scores, now = Scores(6, 16.0), 0
    ranking = Ranking(scores.levels)
    for expert in cached:
        ranking.add(expert)
    for expert, step in history:
        now += step
        scores.touch(expert, 1, 1, now)
        if expert in ranking.cached:
            ranking.renew(expert)
    free = cached - held
    for _ in range(2):
        found = ranking.coldest(held)
        if not free:
            assert found is None
        else:
            assert found in free
            assert scores.levels[found] == min(scores.levels[e] for e in free)


def zipf_trace(length: int, experts: int, seed: int, exponent: float = 1.1) -> list[int]:
    weights = [1 / (rank + 1) ** exponent for rank in range(experts)]
    return random.Random(seed).choices(range(experts), weights, k=length)


def led(trace: list[int], slots: int, half_life: float) -> float:
    """Hits of a cache that goes by one half-life."""
    scores = Scores(max(trace) + 1, half_life, ())
    ghost = Ghost(scores.levels, slots)
    for now, expert in enumerate(trace):
        scores.touch(expert, 1, 1, now)
        ghost.request([expert], True)
    return ghost.hits


def test_a_short_half_life_is_lru() -> None:
    trace, lru, hits = zipf_trace(600, 40, 1), OrderedDict[int, None](), 0
    for expert in trace:
        hits += expert in lru
        lru[expert] = None
        lru.move_to_end(expert)
        if len(lru) > 8:
            lru.popitem(last=False)
    assert led(trace, 8, 0.01) == hits


def test_frequency_finds_more_where_use_is_skewed_and_steady() -> None:
    trace = zipf_trace(6000, 64, 2)
    assert led(trace, 12, 1024.0) > 1.1 * led(trace, 12, 1.0)


def followed(scores: Scores, ghosts: Ghosts, trace: list[int], counts: bool = True) -> list[float]:
    """The half-life that counts after each request."""
    seen = []
    for now, expert in enumerate(trace):
        scores.touch(expert, 1, 1, now)
        ghosts.request({expert: 1}, counts)
        seen.append(scores.half_life)
    return seen


def test_ghosts_go_over_to_what_finds_more() -> None:
    scores = Scores(128, 4.0)
    ghosts = Ghosts(scores, [range(64), range(64, 128)], 24)
    assert ghosts.followed == {0, 1}
    seen = followed(scores, ghosts, zipf_trace(8000, 64, 3))
    assert seen[0] == 4.0
    assert seen[-1] >= 64.0


def test_ghosts_follow_text_that_drifts() -> None:
    # A new set of experts every 40 tokens, each used over and over: what counts is the latest.
    draw, scores = random.Random(4), Scores(400, 256.0)
    trace = [now // 40 * 7 % 390 + draw.randrange(6) for now in range(6000)]
    assert followed(scores, Ghosts(scores, [range(400)], 8), trace)[-1] <= 16.0


def test_prompts_decide_nothing() -> None:
    scores = Scores(64, 4.0)
    seen = followed(scores, Ghosts(scores, [range(64)], 12), zipf_trace(4000, 64, 3), counts=False)
    assert set(seen) == {4.0}


def test_only_some_of_many_banks_are_followed() -> None:
    scores = Scores(8 * 48)
    ghosts = Ghosts(scores, [range(8 * i, 8 * i + 8) for i in range(48)], 100)
    assert len(ghosts.followed) == 4


def test_seeds_keep_the_order_for_each_half_life() -> None:
    scores = Scores(4)
    for expert, share in enumerate((0.5, 0.0, 2.0, 1.0)):
        scores.seed(expert, share)
    for half_life in HALF_LIVES:
        scores.half_life = half_life
        assert warmest(scores.levels, 2) == [2, 3]
        assert warmest(scores.levels, 9) == [2, 3, 0]
        assert scores.levels[1] == -math.inf
