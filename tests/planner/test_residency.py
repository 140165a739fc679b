"""Which blocks stay: against brute force, evenly spread, and fast."""

from __future__ import annotations

import time
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.planner.homes import spread_within
from overflowml_core.planner.residency import choose, spread

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def _choose(sizes, room):
    return choose(sizes, range(len(sizes)), room)


def _subsets(sizes):
    """(resident bytes, largest streamed block) of every way to stream something."""
    for flags in product((False, True), repeat=len(sizes)):
        if not all(flags):
            yield sum(s for s, f in zip(sizes, flags, strict=True) if f), max(s for s, f in zip(sizes, flags, strict=True) if not f)


def _brute(sizes, room):
    """Most resident bytes: with two slots where they fit, but never less than one slot kept where two did not fit yet."""
    pairs = set(_subsets(sizes))
    least = min(kept + 2 * largest for kept, largest in pairs)
    one = [kept for kept, largest in pairs if kept + largest <= min(room, least - 1)]
    two = [kept for kept, largest in pairs if kept + 2 * largest <= room]
    return max(one + two, default=None)


def _kept(sizes, residency):
    return sum(s for s, stays in zip(sizes, residency.resident, strict=True) if stays)


@settings(max_examples=400, deadline=None)
@given(SIZES, st.integers(0, 400))
def test_choice_is_as_good_as_brute_force(sizes, room):
    found = _choose(sizes, room)
    if sum(sizes) <= room:
        assert found.resident == (True,) * len(sizes)
        return
    best = _brute(sizes, room)
    if best is None:
        assert found is None
        return
    assert _kept(sizes, found) == best
    assert _kept(sizes, found) + found.staging_bytes <= room
    assert found.slot_bytes == max(s for s, stays in zip(sizes, found.resident, strict=True) if not stays)
    assert 1 <= found.slot_count <= found.resident.count(False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80), st.floats(0, 1))
def test_many_sizes_are_never_over_the_room(sizes, share):
    room = int(sum(sizes) * share)
    found = _choose(sizes, room)
    if found is None:
        assert room < max(sizes)
    else:
        assert _kept(sizes, found) + found.staging_bytes <= room


@given(st.integers(1, 200), st.integers(0, 200))
def test_spread_differs_by_at_most_one_around_the_pass(count, chosen):
    chosen = min(chosen, count)
    flags = spread(chosen, count)
    assert sum(flags) == chosen
    for mark in (False, True):
        places = [i for i, flag in enumerate(flags) if flag == mark]
        gaps = [b - a for a, b in zip(places, [*places[1:], *[p + count for p in places[:1]]], strict=True)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 400))
def test_equal_blocks_fill_a_home_evenly(count, size, capacity):
    chosen = spread_within([size] * count, capacity)
    assert sum(chosen) == min(count, capacity // size)
    places = [i for i, flag in enumerate(chosen) if flag]
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(SIZES, st.integers(0, 400))
def test_unequal_blocks_leave_no_room_for_another(sizes, capacity):
    chosen = spread_within(sizes, capacity)
    left = capacity - sum(s for s, flag in zip(sizes, chosen, strict=True) if flag)
    assert left >= 0
    assert all(s > left for s, flag in zip(sizes, chosen, strict=True) if not flag)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=14), st.integers(0, 500))
def test_a_third_slot_is_never_free(sizes, room):
    found = _choose(sizes, room)
    if found is not None and found.slot_count == 2:
        assert room - _kept(sizes, found) < 3 * found.slot_bytes


def test_one_slot_where_two_do_not_fit():
    assert _choose([10, 10, 10], 19).slot_count == 1
    assert _choose([10, 10, 10], 20).slot_count == 2
    assert _choose([10, 10, 10], 9) is None


def test_more_room_never_keeps_less_where_one_block_is_large():
    # At 19 one slot is all there is, and the large block stays; at 20 two large slots fit, with nothing beside them.
    assert _kept([10, 6, 6], _choose([10, 6, 6], 19)) == 10
    assert _kept([10, 6, 6], _choose([10, 6, 6], 20)) == 10


@pytest.mark.parametrize(
    ("sizes", "limit_s"),
    [
        ([648] * 19 + [270] * 38, 0.05),
        ([416] * 1000, 0.1),
        ([416, 1000] * 5000, 1.0),
        ([1000 + i % 20 * 37 for i in range(1000)], 1.0),
        ([10**6 + i * 7919 % 10007 for i in range(10_000)], 1.0),
    ],
    ids=["flux", "1000-equal", "10000-two-sizes", "1000-twenty-sizes", "10000-sizes"],
)
def test_choosing_is_fast(sizes, limit_s):
    start = time.process_time()
    assert _choose(sizes, sum(sizes) // 3 + 1) is not None
    assert time.process_time() - start < limit_s
