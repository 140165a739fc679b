"""Predicted hits of a cache of experts, against caches that are led through random requests, and against each other."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.facts import CacheRun, Experts
from overflowml_core.planner.expert_hits import asked_of, lfu_misses, lru_misses, touched_experts
from overflowml_core.runtime.experts.policy import HALF_LIVES, Ranking, Scores

LAYERS = 4


def zipf(count: int, per_token: int, exponent: float, draw: Random) -> tuple[float, ...]:
    """Heat that falls with the rank to a power, for experts in a random order; none is asked for more than once a token."""
    shares = [(rank + 1) ** -exponent for rank in range(count)]
    draw.shuffle(shares)
    heat, left, open_ = [0.0] * count, float(per_token), set(range(count))
    while True:
        total = sum(shares[e] for e in open_)
        full = {e for e in open_ if left * shares[e] / total >= 1}
        if not full:
            break
        for e in full:
            heat[e] = 1.0
        open_ -= full
        left -= len(full)
    for e in open_:
        heat[e] = left * shares[e] / total
    return tuple(heat)


def chosen(heat: tuple[float, ...], draw: Random) -> list[int]:
    """Experts of one token, each with the probability of its heat, always the same number of them (systematic sampling)."""
    order = list(range(len(heat)))
    draw.shuffle(order)
    start, end, found = draw.random(), 0.0, []
    for e in order:
        before, end = end, end + heat[e]
        if int(end - start + 1) > int(before - start + 1):
            found.append(e)
    return found


def requests(heats: list[tuple[float, ...]], tokens: int, draw: Random) -> list[tuple[int, list[int]]]:
    """(layer, experts of all layers by their numbers) for each pass of a layer."""
    return [(layer, [layer * len(heat) + e for e in chosen(heat, draw)]) for _ in range(tokens) for layer, heat in enumerate(heats)]


def lru_hits(trace: list[tuple[int, list[int]]], slots: int, warm: int) -> float:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for number, (_, experts) in enumerate(trace):
        for e in experts:
            hits += number >= warm and e in cache
            asked += number >= warm
            cache[e] = None
            cache.move_to_end(e)
            if len(cache) > slots:
                cache.popitem(last=False)
    return hits / asked


def policy_hits(trace: list[tuple[int, list[int]]], slots: int, warm: int, half_life: float, count: int) -> float:
    """The runtime's ranking, with the half-life that it would find."""
    scores = Scores(count, half_life, ())
    ranking = Ranking(scores.levels)
    hits = asked = 0
    for number, (_, experts) in enumerate(trace):
        for e in experts:
            scores.touch(e, 1, 1, number // LAYERS)
            if e in ranking.cached:
                ranking.renew(e)
        there = [e for e in experts if e in ranking.cached]
        for e in experts:
            if e in ranking.cached:
                continue
            if len(ranking.cached) >= slots:
                coldest = ranking.coldest(experts)
                assert coldest is not None
                ranking.drop(coldest)
            ranking.add(e)
        hits += len(there) if number >= warm else 0
        asked += len(experts) if number >= warm else 0
    return hits / asked


def predicted(heats: list[tuple[float, ...]], per_token: int, slots: int, *runs: CacheRun) -> float:
    asked = asked_of(tuple(Experts(len(heat), 1, per_token, heat=heat, runs=runs) for heat in heats), slots, 1)
    return 1 - sum(a.missed for a in asked) / sum(a.touched for a in asked)


@pytest.mark.parametrize("exponent", [0.6, 1.2])
def test_hits_are_those_of_caches_that_are_led_through_random_requests(exponent: float) -> None:
    draw = Random(7)
    heats = [zipf(64, 4, exponent, draw) for _ in range(LAYERS)]
    trace = requests(heats, 1500, draw)
    rates = [list(heat) for heat in heats]
    for slots in (32, 64, 128):
        simulated = lru_hits(trace, slots, 2000)
        assert 1 - sum(lru_misses(rates, slots)) / (4 * LAYERS) == pytest.approx(simulated, abs=0.02)
        real = max(policy_hits(trace, slots, 2000, half_life, 64 * LAYERS) for half_life in HALF_LIVES)
        assert predicted(heats, 4, slots) == pytest.approx(real, abs=0.03)


def repeated(heats: list[tuple[float, ...]], tokens: int, share: float, draw: Random) -> list[tuple[int, list[int]]]:
    """Requests of tokens that keep each expert of the token before with this probability, and draw the others by heat."""
    trace: list[tuple[int, list[int]]] = []
    for _ in range(tokens):
        for layer, (_, fresh) in enumerate(requests(heats, 1, draw)):
            kept = [e for e in trace[-len(heats)][1] if draw.random() < share] if len(trace) >= len(heats) else []
            trace.append((layer, (kept + [e for e in fresh if e not in kept])[: len(fresh)]))
    return trace


def test_hits_beyond_heat_are_taken_from_earlier_runs() -> None:
    draw = Random(3)
    heats = [zipf(64, 4, 0.8, draw) for _ in range(LAYERS)]
    trace = repeated(heats, 1500, 0.4, draw)
    counts = [[0] * 64 for _ in range(LAYERS)]
    for layer, experts in trace:
        for e in experts:
            counts[layer][e - 64 * layer] += 1
    seen = [tuple(count / 1500 for count in bank) for bank in counts]
    real = {slots: max(policy_hits(trace, slots, 2000, h, 64 * LAYERS) for h in HALF_LIVES) for slots in (32, 64, 128)}
    run = CacheRun(64, 100_000, int(100_000 * real[64]))
    for slots, found in real.items():
        assert predicted(seen, 4, slots) < found - 0.04
        assert predicted(seen, 4, slots, run) == pytest.approx(found, abs=0.04)
    assert predicted(seen, 4, 64, run) == pytest.approx(real[64], abs=0.001)
    # A run that hardly missed anything, or whose cache held everything, says nothing; a worse one than by heat alone was cold.
    for other in (CacheRun(256, 100_000, 100_000), CacheRun(64, 100_000, 100)):
        assert predicted(seen, 4, 32, other) == predicted(seen, 4, 32)
    both = predicted(seen, 4, 32, run, CacheRun(250, 100_000, 99_990))
    assert both == pytest.approx(predicted(seen, 4, 32, run), abs=0.03)


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=3), min_size=1, max_size=3), st.integers(0, 8))
def test_no_fixed_set_of_experts_finds_more_than_the_hottest(heats: list[list[float]], slots: int) -> None:
    everyone = [(place, number) for place, bank in enumerate(heats) for number in range(len(bank))]
    total = sum(map(sum, heats))
    best = max(sum(heats[p][n] for p, n in held) for held in combinations(everyone, min(slots, len(everyone))))
    assert sum(lfu_misses(heats, heats, slots)) == pytest.approx(total - best, abs=1e-9)


@st.composite
def banks(draw: st.DrawFn) -> tuple[Experts, ...]:
    heated = draw(st.booleans())
    made = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(2, 12))
        heat = tuple(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))) if heated else ()
        made.append(Experts(count, 1, draw(st.integers(1, count)), heat=heat))
    runs = tuple(
        CacheRun(slots, asked, int(asked * share))
        for slots, asked, share in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10**6), st.floats(0, 1)), max_size=3))
    )
    return tuple(replace(bank, runs=runs) for bank in made)


@given(banks(), st.integers(1, 300))
def test_a_larger_cache_never_misses_more(experts: tuple[Experts, ...], tokens: int) -> None:
    count = sum(bank.count for bank in experts)
    before = None
    for slots in range(count + 2):
        asked = asked_of(experts, slots, tokens)
        assert all(-1e-9 <= a.missed <= a.touched + 1e-9 for a in asked)
        missed = sum(a.missed for a in asked)
        assert before is None or missed <= before + 1e-3 * count
        before = missed
    assert before == 0


def test_without_heat_hits_follow_what_was_published() -> None:
    def found(slots: int, tokens: int = 1) -> float:
        asked = asked_of((Experts(512, 1, 8),) * 10, 10 * slots, tokens)
        return 1 - sum(a.missed for a in asked) / sum(a.touched for a in asked)

    assert found(64) == pytest.approx(0.67, abs=0.01)
    assert found(128) == pytest.approx(0.81, abs=0.01)
    assert found(512) == found(600) == 1
    assert found(128, 4096) == pytest.approx((1280 - 256) / 5120, abs=0.001)
    # What only passes through finds nothing.
    assert sum(a.missed for a in asked_of((Experts(512, 1, 8),), 4, 1)) == pytest.approx(8)


def test_slots_are_for_all_banks_together() -> None:
    hot, cold = Experts(4, 1, 2, heat=(1.0, 1.0, 0.0, 0.0)), Experts(4, 1, 2, heat=(0.5, 0.5, 0.5, 0.5))
    one, other = asked_of((hot, cold), 4, 1)
    assert one.missed < 0.1 * other.missed
    assert other.touched == 2


def test_few_tokens_touch_few_experts() -> None:
    bank = Experts(128, 1, 8)
    assert touched_experts(bank, 1) == pytest.approx(8)
    assert 100 < touched_experts(bank, 32) < 128
    assert touched_experts(bank, 10**9) == 128
    skewed = Experts(4, 1, 1, heat=(0.97, 0.01, 0.01, 0.01))
    assert touched_experts(skewed, 1) == pytest.approx(1)
    assert touched_experts(skewed, 8) < 1.3 < touched_experts(Experts(4, 1, 1), 8)


def test_heat_of_another_number_of_experts_is_no_heat() -> None:
    assert asked_of((Experts(8, 1, 2, heat=(1.0, 1.0)),), 4, 1) == asked_of((Experts(8, 1, 2),), 4, 1)
