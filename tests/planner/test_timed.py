"""The search by time: what it tries, and how near it comes where it cannot try everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.planner import timed
from overflowml_core.planner.cost import Spent
from overflowml_core.planner.machinery import Move
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.timed import Problem, choose_timed
from overflowml_core.work import PassProfile


def _problem(sizes, seconds, room, count=20, turns=False) -> Problem:
    part = Part("m", PassProfile("denoise", count, 0), tuple(range(len(sizes))), tuple(seconds), Spent(sum(seconds), 0.0))
    rate = [float(size) for size in sizes]
    bring = rate if turns else [0.0] * len(sizes)
    return Problem(
        sizes,
        range(len(sizes)),
        room,
        [Round("denoise", count, (part,))],
        [Move(s, nbytes=n) for s, n in zip(rate, sizes, strict=True)],
        bring,
        0.0,
        turns,
        False,
    )


def _total(problem, choice) -> float:
    stays = [stay and bool(size) for stay, size in zip(choice.resident, problem.sizes_bytes, strict=True)]
    return problem.seconds([stay or not size for stay, size in zip(stays, problem.sizes_bytes, strict=True)], choice.staging_bytes)


ROW = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=4, max_size=7)


@settings(max_examples=150)
@given(ROW, st.integers(20, 110), st.booleans())
def test_ways_to_fill_the_room_come_near_the_optimum(row, percent, turns):
    """Within a third at worst, for so few blocks that one of them is much of the whole; most choices are the optimum itself."""
    sizes, seconds = [s for s, _ in row], [c / 2 for _, c in row]
    room = sum(sizes) * percent // 100
    best, problem = choose_timed(_problem(sizes, seconds, room, turns=turns)), _problem(sizes, seconds, room, turns=turns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed, "MOST_ENUMERATED", 0)
        found = choose_timed(problem)
    assert (found is None) == (best is None)
    if found is not None:
        assert _total(problem, best) <= _total(problem, found) * (1 + 1e-9)
        assert _total(problem, found) <= _total(problem, best) * 1.34


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=8, max_size=40), st.integers(0, 110))
def test_a_choice_is_never_over_the_room(row, percent):
    sizes, seconds = [s for s, _ in row], [c / 2 for _, c in row]
    room = sum(sizes) * percent // 100
    choice = choose_timed(_problem(sizes, seconds, room))
    if choice is None:
        assert room < max(sizes)
        return
    kept = sum(size for size, stays in zip(sizes, choice.resident, strict=True) if stays)
    streamed = [size for size, stays in zip(sizes, choice.resident, strict=True) if not stays]
    assert kept + choice.staging_bytes <= room
    assert choice.slot_bytes == max(streamed, default=0)
    assert choice.slot_bytes <= choice.staging_bytes <= max(sum(streamed) - 1, 0)


@pytest.mark.parametrize("count", [100, 1000, 10_000])
def test_the_search_simulates_so_many_steps_and_no_more(count):
    """The bound holds whatever the number of blocks; beyond it there is one choice, which takes as many steps as there are blocks."""
    sizes, seconds = [3 + i % 5 for i in range(count)], [(i % 7) * 0.9 for i in range(count)]
    problem = _problem(sizes, seconds, sum(sizes) // 2)
    assert choose_timed(problem) is not None
    assert problem.steps <= timed._MOST_STEPS + 2 * 4 * count


def test_unequal_blocks_keep_those_whose_copies_hide_least():
    """Two slow blocks hide the copies of the fast ones behind them."""
    choice = choose_timed(_problem([4, 4, 4, 4], [8.0, 0.1, 8.0, 0.1], 12))
    problem = _problem([4, 4, 4, 4], [8.0, 0.1, 8.0, 0.1], 12)
    assert _total(problem, choice) == pytest.approx(20 * 16.2)


def test_without_turns_everything_stays_where_it_fits():
    assert choose_timed(_problem([4, 4], [1.0, 1.0], 8)).resident == (True, True)


def test_a_phase_that_runs_once_may_stream_what_it_could_hold():
    """Residents come in before anything computes, streamed blocks while others do."""
    once = _problem([4] * 4, [5.0] * 4, 100, count=1, turns=True)
    choice = choose_timed(once)
    assert not all(choice.resident)
    assert _total(once, choice) < 4 * 4 + 4 * 5.0
    assert all(choose_timed(_problem([4] * 4, [1.0] * 4, 100, count=50, turns=True)).resident)
