"""Where blocks lie in the staging buffer: against every byte counted one by one."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.staging import Place, behind, fitting, free_bytes, likewise

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=9)
PLACES = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda pair: Place(pair[0], sum(pair), 20))


def bytes_of(place: Place) -> set[int]:
    return set(range(place.start, place.end))


@given(PLACES, st.lists(PLACES, max_size=4))
def test_free_bytes_are_those_before_the_first_that_is_taken(place, taken):
    held = set().union(*map(bytes_of, taken))
    counted = next((byte - place.start for byte in range(place.start, place.end) if byte in held), place.end - place.start)
    assert free_bytes(place, taken) == counted


@given(SIZES, st.integers(0, 40))
def test_a_block_that_would_cross_the_end_starts_again(sizes, more):
    staging_bytes, end = max(sizes) + more, 0
    for nbytes in islice(cycle(sizes), 30):
        place = behind(end, nbytes, staging_bytes)
        assert place.end - place.start == nbytes
        assert place.end <= staging_bytes
        assert (place.start, place.left) == ((end, staging_bytes) if end + nbytes <= staging_bytes else (0, end))
        end = place.end


@given(PLACES, PLACES, st.integers(0, 6), st.integers(0, 6), st.integers(0, 20))
def test_a_part_overwrites_what_shares_a_byte_with_it_and_the_first_what_is_left_behind(place, other, sent, more, left):
    place = place._replace(left=left)
    part = set(range(place.start + sent, place.start + sent + more))
    shares = bool(part & bytes_of(other)) if part and bytes_of(other) else None
    left_behind = not sent and other.end > left
    if shares is not None:
        assert place.overwrites(other, sent, sent + more) == (shares or left_behind)


def windows(sizes: list[int]) -> set[int]:
    count = len(sizes)
    return {sum(islice(cycle(sizes), first, last)) for first in range(count) for last in range(first + 1, first + count + 1)}


@given(SIZES, st.integers(0, 110))
def test_a_buffer_has_no_byte_that_consecutive_blocks_do_not_take(sizes, most):
    fitting_bytes = fitting(sizes, most)
    if max(sizes) > most:
        assert fitting_bytes == 0
    else:
        assert fitting_bytes == max(total for total in windows(sizes) if total <= most)


@pytest.mark.parametrize(("count", "most", "expected"), [(5, 24, 20), (5, 19, 10), (5, 9, 0), (2, 99, 20)])
def test_blocks_of_one_size_fill_whole_slots(count, most, expected):
    assert fitting([10] * count, most) == expected


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=9), st.integers(0, 60))
def test_a_buffer_for_other_sizes_holds_as_many_blocks_at_a_time(pairs, more):
    sizes, others = [size for size, _ in pairs], [other for _, other in pairs]
    staging_bytes = max(sizes) + more
    grown = likewise(sizes, staging_bytes, others)
    assert likewise(sizes, staging_bytes, sizes) <= staging_bytes
    end = other_end = 0
    for size, other in islice(cycle(pairs), 100):
        place = behind(end, size, staging_bytes)
        end, other_end = place.end, other if place.start == 0 else other_end + other
        if sum(sizes) > staging_bytes:
            assert max(others) <= other_end <= grown or other_end <= grown
    assert grown >= max(others)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.integers(0, 60))
def test_places_repeat_after_a_few_passes(sizes, more):
    """A block has no more places than the buffer holds blocks at a time, and there is room for each of them in its parameters."""
    staging_bytes, end = max(sizes) + more, 0
    if sum(sizes) <= staging_bytes:
        return
    starts: list[set[int]] = [set() for _ in sizes]
    for number in range(100):
        for k, size in enumerate(sizes):
            place = behind(end, size, staging_bytes)
            end = place.end
            if number >= 50:
                starts[k].add(place.start)
    assert max(map(len, starts)) <= max(1, staging_bytes // min(sizes))
