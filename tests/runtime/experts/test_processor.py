"""Which experts the processor computes: against the best of all divisions."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.runtime.experts.processor import MOST_TOKENS, Division

NBYTES = 1000


@given(st.integers(1, 7), st.floats(0.1, 10))
def test_both_are_done_as_early_as_can_be(missed: int, ratio: float) -> None:
    division = Division(NBYTES * 1.0, NBYTES * ratio)
    chosen = division.for_processor(range(missed), dict.fromkeys(range(missed), 1), NBYTES, 2, 64, 1)

    def end(on_processor: int) -> float:
        return max(missed - on_processor, on_processor / ratio)

    best = min(end(len(some)) for size in range(missed + 1) for some in combinations(range(missed), size))
    assert end(len(chosen)) <= best + 1e-9


def test_experts_with_many_tokens_are_copied() -> None:
    chosen = Division(1000.0, 1000.0).for_processor([0, 1, 2], {0: 1, 1: 50, 2: 1}, NBYTES, 2, 64, 50)
    assert 1 not in chosen
    assert chosen


def test_a_pass_of_many_tokens_is_the_devices() -> None:
    tokens = MOST_TOKENS * 64 // 2 + 1
    assert Division(1.0, 1e9).for_processor([0], {0: 1}, NBYTES, 2, 64, tokens) == []


def test_without_rates_nothing_is_divided() -> None:
    assert not Division(0.0, 1.0).is_possible
    assert not Division(1.0, 0.0).is_possible
    assert Division(1.0, 0.0).for_processor([0], {0: 1}, NBYTES, 2, 64, 1) == []


def test_what_is_measured_counts() -> None:
    division = Division(1000.0, 1e9)
    for _ in range(200):
        division.saw(NBYTES, 100.0)
    assert division.for_processor([0, 1], {0: 1, 1: 1}, NBYTES, 2, 64, 1) == []
