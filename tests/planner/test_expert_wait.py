"""Waits for missed experts, against single layers that are replayed event by event."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.planner import expert_pace
from overflowml_core.planner.expert_wait import expected_wait_s
from overflowml_core.runtime.experts import cache

READ_S = 1.3e-3
"""Of one expert that is read alone."""
PASSES = 1500


def layer_s(missed: int, touched: int, at_once: int, compute_s: float) -> float:
    """Seconds from the router to the last result: reads share the rate, and one expert computes at a time, cached ones first."""
    waiting, left, arrived, now = missed, [], [], 0.0
    while waiting or left:
        while waiting and len(left) < at_once:
            waiting -= 1
            left.append(READ_S)
        shortest = min(left)
        now += shortest * len(left)
        arrived += [now for one in left if one - shortest < 1e-9]
        left = [one - shortest for one in left if one - shortest >= 1e-9]
    end = (touched - missed) * compute_s
    for moment in arrived:
        end = max(end, moment) + compute_s
    return end


@pytest.mark.parametrize(
    ("touched", "at_once", "compute_s"), [(8, 4, 2e-4), (8, 4, 6e-4), (8, 1, 2e-4), (2, 4, 1e-3), (4, 1, 5e-4), (16, 4, 1e-4)]
)
def test_waits_are_those_of_layers_that_are_replayed(touched: int, at_once: int, compute_s: float) -> None:
    draw = Random(1)
    for share in (0.05, 0.13, 0.23, 0.4, 0.6, 0.9):
        misses = [sum(draw.random() < share for _ in range(touched)) for _ in range(PASSES)]
        real = sum(layer_s(missed, touched, at_once, compute_s) for missed in misses) / PASSES
        wait_s = expected_wait_s((touched, share * touched), at_once, touched * compute_s, lambda missed: missed * READ_S)
        assert touched * compute_s + wait_s == pytest.approx(real, rel=0.11 if compute_s > READ_S / 4 and touched > 4 else 0.06)


def test_no_miss_is_no_wait() -> None:
    assert expected_wait_s((8, 0), 4, 1.0, lambda missed: missed) == 0
    assert expected_wait_s((0, 0), 4, 1.0, lambda missed: missed) == 0


def test_all_missed_wait_for_the_reads_and_then_for_those_that_came_last() -> None:
    assert expected_wait_s((8, 8), 4, 0.8, lambda missed: missed) == pytest.approx(8 - 0.8 + 0.4)
    assert expected_wait_s((100, 100), 4, 1.0, lambda missed: missed) == pytest.approx(100 - 1.0 + 0.04)


def test_a_rare_miss_is_waited_for_though_none_is_missed_on_the_average() -> None:
    assert expected_wait_s((8, 0.5), 4, 0.8, lambda missed: missed) > 0.1


@given(st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.floats(0, 10))
def test_more_misses_are_never_a_shorter_wait(touched: int, one: float, other: float, at_once: int, compute_s: float) -> None:
    few, many = (expected_wait_s((touched, share * touched), at_once, compute_s, lambda missed: missed) for share in sorted((one, other)))
    assert 0 <= few <= many + 1e-9 * (1 + many)
    assert many <= touched + 1e-9 * touched


def test_as_many_come_at_once_as_threads_read() -> None:
    assert cache._READERS == expert_pace._AT_ONCE_IN_RAM
