"""The simulated engines: against figures reckoned by hand, and the quick loop against the full simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.planner.cost import Spent
from overflowml_core.planner.machinery import Lane, Machinery, Move
from overflowml_core.planner.pace import Pace, Quick, Stage, machinery_of, pace_of, steps_of
from overflowml_core.planner.rounds import OUTSIDE, Part, Round
from overflowml_core.work import PassProfile


def part(seconds, outside_s=0.0) -> Part:
    steps = (*range(len(seconds)), OUTSIDE)
    return Part("m", PassProfile("denoise", 1, 0), steps, (*seconds, outside_s), Spent(sum(seconds) + outside_s, 0.0))


def stage(resident, moves, staging_bytes, in_ram=False) -> Stage:
    slots, kept = [], []
    for stays, move in zip(resident, moves, strict=True):
        slots.append(None if stays else (0, len(kept)))
        if not stays:
            kept.append(move)
    return Stage(tuple(slots), (tuple(kept),), staging_bytes, in_ram=in_ram)


def steady_s(seconds, moves, slot_count, resident=None, **options) -> float:
    place = stage(resident or [False] * len(seconds), moves, slot_count, **options)
    return pace_of([Round("denoise", 20, (part(seconds),))], place, 0.0, False).rounds[0].round_s


@pytest.mark.parametrize(("copy", "compute"), [(1.0, 0.25), (0.25, 1.0), (1.0, 1.0)])
def test_with_two_slots_a_pass_takes_the_longer_of_copies_and_products(copy, compute):
    assert steady_s([compute] * 6, [Move(copy)] * 6, 2) == pytest.approx(6 * max(copy, compute))


def test_with_one_slot_a_pass_takes_the_sum():
    assert steady_s([0.5] * 6, [Move(1.0)] * 6, 1) == pytest.approx(6 * 1.5)


def test_residents_between_streamed_blocks_hide_the_copies():
    assert steady_s([0.5] * 12, [Move(1.0)] * 12, 2, [i % 2 == 0 for i in range(12)]) == pytest.approx(6.0)


def test_leading_residents_do_not_hide_as_much():
    assert steady_s([0.5] * 12, [Move(1.0)] * 12, 2, [i < 6 for i in range(12)]) > 6.5


@pytest.mark.parametrize("slot_count", [2, 3, 4])
@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_number_of_blocks_does_not_matter(count, slot_count):
    """The last block of a pass and the first of the next are in different slots."""
    assert steady_s([1.0] * count, [Move(1.0)] * count, slot_count) == pytest.approx(count)


def test_a_block_that_has_a_slot_of_its_own_is_copied_once():
    place = stage([False] * 3, [Move(1.0)] * 3, 3)
    assert pace_of([Round("denoise", 9, (part([0.1] * 3),))], place, 0.0, False).rounds[0].link_s == 0.0


def test_the_first_pass_finds_its_slots_full_and_a_phase_that_begins_finds_them_empty():
    rounds = [Round("denoise", 1, (part([0.1] * 4),))]
    place = stage([False] * 4, [Move(1.0)] * 4, 2)
    assert pace_of(rounds, place, 0.0, False).total_s == pytest.approx(2.2)
    # Empty slots, and two copies for a pass that does not come.
    assert pace_of(rounds, place, 0.0, True).total_s == pytest.approx(6.0)
    assert pace_of(rounds, place, 3.0, True).total_s == pytest.approx(9.0)


def test_the_disk_reads_while_blocks_are_copied_and_computed():
    moves = [Move(0.5, 1.0, 4)] * 6
    assert steady_s([0.25] * 6, moves, 2) == pytest.approx(6.0)
    assert steady_s([2.0] * 6, moves, 2) == pytest.approx(12.0)


def test_in_ram_the_reader_is_the_copy_engine():
    assert steady_s([0.25] * 6, [Move(0.0, 1.0)] * 6, 2, in_ram=True) == pytest.approx(6.0)
    assert steady_s([0.25] * 6, [Move(0.0, 1.0)] * 6, 1, in_ram=True) == pytest.approx(7.5)


def test_pageable_copies_hide_behind_computing_for_the_reader_waits_for_them():
    pageable, pinned = [Move(1.0, holds_reader=True)] * 6, [Move(1.0)] * 6
    assert steady_s([1.0] * 6, pageable, 2) == steady_s([1.0] * 6, pinned, 2) == pytest.approx(6.0)
    assert steady_s([0.25] * 6, pageable, 2) == pytest.approx(6.0)


def test_a_pageable_copy_holds_up_what_the_reader_brings_behind_it():
    """The second block's copy is asked for when the first is there, the third's when the slot of the first is free."""
    events = []
    lanes = [Lane([Move(4.0, holds_reader=True), Move(1.0, 2.0), Move(1.0)], 3)]
    Machinery(lanes, record=lambda *event: events.append(event)).run([(0, k, 1.0, k) for k in range(3)])
    spans = {(engine, k): (start, end) for engine, _, k, start, end in events if engine != "compute"}
    assert spans["disk", 1] == (4.0, 6.0)
    assert spans["link", 0] == (0.0, 4.0)


def test_a_block_from_disk_does_not_hold_up_one_from_ram():
    """The reader takes 10 s for the second block; meanwhile the third is copied, for its slot is free."""
    events = []
    lanes = [Lane([Move(1.0), Move(1.0, 10.0), Move(1.0)], 3)]
    Machinery(lanes, record=lambda *event: events.append(event)).run([(0, k, 1.0, k) for k in range(3)])
    copies = {k: (start, end) for engine, _, k, start, end in events if engine == "link"}
    assert copies[2] == (1.0, 2.0)
    assert copies[1] == (10.0, 11.0)


SECONDS = st.integers(0, 12).map(lambda n: n / 4)


def exactly(count):
    return {"min_size": count, "max_size": count}


@st.composite
def rows(draw):
    count = draw(st.integers(1, 9))
    in_ram = draw(st.booleans())
    seconds = draw(st.lists(SECONDS, min_size=count, max_size=count))
    copies = draw(st.lists(SECONDS.map(lambda s: s + 0.25), min_size=count, max_size=count))
    sizes = draw(st.one_of(st.just([1] * count), st.lists(st.integers(1, 24), **exactly(count))))
    moves = [Move(0.0, c, nbytes=n) if in_ram else Move(c, nbytes=n) for c, n in zip(copies, sizes, strict=True)]
    resident = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    if all(resident):
        resident[0] = False
    streamed = [size for size, stays in zip(sizes, resident, strict=True) if not stays]
    staging_bytes = draw(st.integers(max(streamed), sum(streamed)))
    return part(seconds, draw(SECONDS)), stage(resident, moves, staging_bytes, in_ram)


@settings(max_examples=400, deadline=None)
@given(rows(), st.booleans(), SECONDS)
def test_the_quick_loop_gives_the_same_times_as_the_simulation(row, filled, start_s):
    one, place = row
    quick = Quick(place.moves[0], place.staging_bytes, start_s, filled=filled, in_ram=place.in_ram)
    full = machinery_of(place, start_s, not filled)
    for _ in range(5):
        quick.run_part(one, place)
        full.run(steps_of(one, place))
        assert quick.compute_s == pytest.approx(full.compute_s)
    assert quick.drain() == pytest.approx(full.drain())
    assert quick.link_s + quick.disk_s == pytest.approx(full.link_s + full.disk_s)


def byte_by_byte(seconds, copies, sizes, staging_bytes, passes, filled) -> list[float]:
    """Ends of passes over streamed blocks alone: every byte of the buffer knows which call it waits for. Blocks are copied one after the
    other, each in parts of an eighth at least as its bytes come free from the first on."""
    count = len(sizes)
    waits_for = [-1] * staging_bytes  # per byte, the call that reads it last
    ready = {}
    ends: list[float] = []
    now = copy_end = 0.0
    following, start, sent, end = 0, None, 0, 0

    def copy_until(call: int) -> None:
        """What may be copied when this call is over."""
        nonlocal following, start, sent, end, copy_end
        while following <= call + count:
            size = sizes[following % count]
            if start is None:
                start = end if end + size <= staging_bytes else 0
            upto = sent
            while upto < size and waits_for[start + upto] <= call:
                upto += 1
            if upto < size and (upto - sent) * 8 < size:
                return
            copy_end = max(copy_end, now) + (0.0 if filled and call < 0 else copies[following % count] * (upto - sent) / size)
            waits_for[start + sent : start + upto] = [following] * (upto - sent)
            ready[following], sent = copy_end, upto
            if upto < size:
                return
            following, end, start, sent = following + 1, start + size, None, 0

    copy_until(-1)
    for call in range(passes * count):
        now = max(now, ready[call]) + seconds[call % count]
        copy_until(call)
        if call % count == count - 1:
            ends.append(now)
    return ends


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(SECONDS, SECONDS, st.integers(1, 16)), min_size=2, max_size=8), st.integers(0, 60), st.booleans())
def test_passes_end_as_when_every_byte_is_followed(row, more, filled):
    seconds, copies, sizes = (list(column) for column in zip(*row, strict=True))
    staging_bytes = min(max(sizes) + more, sum(sizes) - 1)
    if staging_bytes < max(sizes):
        staging_bytes = max(sizes)
    moves = [Move(copy, nbytes=size) for copy, size in zip(copies, sizes, strict=True)]
    place = stage([False] * len(sizes), moves, staging_bytes)
    full = machinery_of(place, 0.0, not filled)
    ends = [full.run(steps_of(part(seconds), place)) for _ in range(6)]
    assert ends == pytest.approx(byte_by_byte(seconds, copies, sizes, staging_bytes, 6, filled))


def test_a_large_block_comes_in_behind_each_of_the_small_ones_that_it_overwrites():
    """Two halves of it, each while the next small block computes; as a whole it would have to wait for both."""
    events = []
    moves = [Move(1.0, nbytes=2), Move(1.0, nbytes=2), Move(2.0, nbytes=4)]
    Machinery([Lane(moves, 4)], record=lambda *event: events.append(event)).run([(0, k, 4.0, k) for k in range(3)])
    assert [event[3:] for event in events if event[0] == "link" and event[2] == 2] == [(5.0, 6.0), (9.0, 10.0)]


def assert_multiplied_as_simulated(one: Part, place: Stage, count: int, takes_turns: bool) -> None:
    full = machinery_of(place, 0.0, takes_turns)
    for _ in range(count):
        full.run(steps_of(one, place))
    pace = pace_of([Round("denoise", count, (one,))], place, 0.0, takes_turns)
    expected_s = full.drain() if takes_turns else full.compute_s
    # Only where the copies' lead lasts for more passes than are simulated is their mean not that of all.
    assert pace.total_s == pytest.approx(expected_s, rel=0.02, abs=1e-9)
    assert pace.total_s == pytest.approx(expected_s) or count > 32


@settings(max_examples=200, deadline=None)
@given(rows(), st.integers(1, 40), st.booleans())
def test_multiplied_passes_take_what_simulated_ones_take(row, count, takes_turns):
    assert_multiplied_as_simulated(*row, count, takes_turns)


@pytest.mark.parametrize("last_s", [1.0, 2.5])
def test_passes_of_one_length_are_no_rhythm_while_the_lead_of_the_copies_shrinks(last_s):
    """Three passes compute without a wait, until what the slots held at the start is used up."""
    seconds = [0.0, 0.0, 0.0, 0.5, 0.0, 0.25, last_s, 0.25]
    copies = [0.25, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25, last_s]
    place = stage([i in (3, 5) for i in range(8)], [Move(copy) for copy in copies], 4)
    for count in (4, 40):
        assert_multiplied_as_simulated(part(seconds, 0.25), place, count, False)
    assert pace_of([Round("denoise", 40, (part(seconds, 0.25),))], place, 0.0, False).rounds[0].round_s == pytest.approx(sum(copies) - 0.5)


@st.composite
def mixed_rows(draw):
    """Blocks from everywhere, on one device or two."""
    count = draw(st.integers(1, 8))
    length_s = SECONDS.map(lambda s: s + 0.25)
    from_disk = st.builds(Move, length_s, length_s, st.integers(1, 4))
    moves = draw(
        st.lists(st.one_of(length_s.map(Move), from_disk, st.builds(Move, length_s, holds_reader=st.just(True))), **exactly(count))
    )
    cut = draw(st.integers(0, count))
    devices = (0,) * (count - cut) + (1,) * cut
    slots = tuple((device, devices[:i].count(device)) for i, device in enumerate(devices))
    lanes = tuple(tuple(move for move, own in zip(moves, devices, strict=True) if own == lane) for lane in range(2))
    row = part(draw(st.lists(SECONDS, **exactly(count))), draw(SECONDS))
    return row, Stage(slots, lanes, draw(st.integers(1, 4)), devices, draw(st.sampled_from([0.0, 0.1])))


@settings(max_examples=150, deadline=None)
@given(mixed_rows(), st.integers(1, 40), st.booleans())
def test_multiplied_passes_of_blocks_from_everywhere_take_what_simulated_ones_take(row, count, takes_turns):
    assert_multiplied_as_simulated(*row, count, takes_turns)


@settings(max_examples=200, deadline=None)
@given(rows(), st.integers(1, 12))
def test_a_pass_is_never_faster_than_its_computing(row, count):
    one, place = row
    pace: Pace = pace_of([Round("denoise", count, (one,))], place, 0.0, False)
    first = pace.rounds[0]
    assert first.round_s >= one.spent.total_s - 1e-9
    assert pace.total_s >= count * one.spent.total_s - 1e-9


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(2, 6))
def test_rounds_of_several_parts_are_the_same_as_one_row(row, split):
    """A phase of two components is one row of blocks."""
    one, place = row
    blocks = len(one.steps) - 1
    cut = min(split, blocks)
    left = replace(one, steps=one.steps[:cut], seconds=one.seconds[:cut])
    right = replace(one, steps=one.steps[cut:], seconds=one.seconds[cut:])
    whole = pace_of([Round("denoise", 7, (one,))], place, 0.0, False)
    parts = pace_of([Round("denoise", 7, (left, right))], place, 0.0, False)
    assert parts.total_s == pytest.approx(whole.total_s)
    assert sum(parts.rounds[0].part_s) == pytest.approx(whole.rounds[0].round_s)
