"""Batches: every item once and in order, whatever runs out of memory, and sizes that follow what happens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import overflowml
from overflowml_core.batches import Batch, BatchSizer, is_out_of_memory
from overflowml_core.batches.batch import batches
from overflowml_core.errors import BadLimits, DoesNotFit


def drive(items, sizer, fits) -> tuple[list[int], list[int]]:
    """Run batches of which those with more than ``fits(number)`` items run out of memory. What was done, and the sizes that were tried."""
    done, sizes = [], []
    for number, batch in enumerate(batches(items, sizer)):
        sizes.append(len(batch))
        with batch:
            if len(batch) > fits(number):
                raise MemoryError("too many")
            assert batch.first == len(done)
            done += batch
    return done, sizes


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 25), min_size=1, max_size=30))
def test_every_item_comes_once_and_in_order(count, first, largest, room):
    limits = itertools.cycle(room)
    done, sizes = drive(range(count), BatchSizer(first, largest), lambda number: next(limits))
    assert done == list(range(count))
    assert all(1 <= size <= largest for size in sizes)


def test_a_batch_is_halved_retried_grown_and_kept_below_what_failed():
    done, sizes = drive(range(40), BatchSizer(8, 16), lambda number: 5)
    assert done == list(range(40))
    assert sizes == [8, 4, 4, 7, 3, 3, 6, 3, 3, 5, 5, 5, 5]


def test_a_size_that_failed_is_tried_again_once_memory_may_be_free():
    _, sizes = drive(range(100), BatchSizer(8, 8), lambda number: 4 if number < 3 else 99)
    assert sizes[:3] == [8, 4, 4]
    assert 8 in sizes[3:]


def test_a_single_item_is_tried_twice_and_then_its_error_is_raised():
    tried = []
    with pytest.raises(MemoryError, match="never"):
        for batch in batches("abc", BatchSizer(2, 2)):
            with batch:
                tried.append("".join(batch))
                if "b" in batch:
                    raise MemoryError("never")
    assert tried == ["ab", "a", "b", "b"]


def test_other_errors_are_not_ours():
    with pytest.raises(ZeroDivisionError):
        for batch in overflowml.auto_batch([1, 2]):
            with batch:
                _ = 1 / 0
    batch = Batch([1], 0)
    with pytest.raises(DoesNotFit), batch:
        raise DoesNotFit("a plan does not depend on the batch")
    assert not batch.failed


def test_items_are_taken_as_they_are_needed_and_batches_are_lists():
    endless = itertools.count()
    found = list(itertools.islice(overflowml.auto_batch(endless, batch_size=3), 2))
    assert found == [[0, 1, 2], [3, 4, 5]]
    assert isinstance(found[0], list)
    assert next(endless) == 6


def test_without_an_accelerator_or_a_plan_sizes_grow_from_one():
    assert [len(batch) for batch in overflowml.auto_batch(range(20), max_batch_size=4)] == [1, 1, 2, 2, 4, 4, 4, 2]


def test_a_guard_may_cut_batches_itself():
    guard = overflowml.MemoryGuard(threshold=1e-9)
    assert [list(batch) for batch in guard.auto_batch(list("abc"), batch_size=2)] == [["a", "b"], ["c"]]
    assert guard.cleanings >= 1


@pytest.mark.parametrize("arguments", [{"items": "one text"}, {"items": [], "batch_size": 0}, {"items": [], "max_batch_size": 2.0}])
def test_bad_input_is_refused_at_once(arguments):
    with pytest.raises(BadLimits):
        overflowml.auto_batch(**arguments)


def test_out_of_memory_is_told_from_other_errors():
    torch = pytest.importorskip("torch")
    words = ("CUDA error: out of memory", "MPS backend out of memory (MPS allocated: 1 GB)", "[enforce fail] can't allocate memory: 8 bytes")
    for error in (MemoryError(), torch.OutOfMemoryError("x"), *map(RuntimeError, words)):
        assert is_out_of_memory(error), error
    try:
        raise KeyError from MemoryError()
    except KeyError as wrapped:
        assert is_out_of_memory(wrapped)
    for error in (None, RuntimeError("shapes"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)
