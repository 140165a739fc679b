"""Batches: every item once and in order, whatever runs out of memory, and sizes that follow what happens."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import overflowml
from overflowml_core import session
from overflowml_core.bare import bare_network
from overflowml_core.batches import BatchSizer, is_out_of_memory
from overflowml_core.batches.batch import batches
from overflowml_core.batches.room import most_that_fit
from overflowml_core.errors import BadLimits, DoesNotFit
from overflowml_core.facts import Limits, Workload
from overflowml_core.inspect.named import named_machine


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

    def never_b() -> None:
        for batch in batches("abc", BatchSizer(2, 2)):
            with batch:
                tried.append("".join(batch))
                if "b" in batch:
                    raise MemoryError("never")

    with pytest.raises(MemoryError, match="never"):
        never_b()
    assert tried == ["ab", "a", "b", "b"]


def test_other_errors_are_not_ours():
    batch = next(overflowml.auto_batch([1, 2]))
    with pytest.raises(ZeroDivisionError), batch:
        _ = 1 / 0
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
    words = (
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "[enforce fail] can't allocate memory: 8 bytes",
    )
    for error in (MemoryError(), torch.OutOfMemoryError("x"), *map(RuntimeError, words)):
        assert is_out_of_memory(error), error
    wrapped = KeyError()
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    for error in (None, RuntimeError("shapes"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)


def test_a_plan_that_streams_has_room_for_what_it_was_planned_for():
    work = Workload(batch=3)
    for gpu in ("RTX 5090", "H100 80GB"):
        machine = named_machine(gpu, ram_bytes=194 * 10**9)
        plan = session.make_plan(bare_network(40 * 10**9, work), Limits(), work, machine, forecast=True)
        most = most_that_fit(plan)
        assert most is not None
        assert most >= 3
        for phase in plan.phases:
            held = phase.device_bytes - phase.activation_bytes
            assert held + phase.activation_bytes * most // 3 <= plan.budget.device_bytes
        assert (most > 3) is (plan.kind == "direct")


def test_the_first_batch_of_a_managed_pipeline_is_what_its_plan_leaves_room_for(monkeypatch):
    work = Workload(batch=2)
    network = bare_network(10**9, work)
    machine = named_machine("RTX 5090", ram_bytes=194 * 10**9)
    whole = session.make_plan(network, Limits(), work, machine, forecast=True)
    held = sum(one.device_bytes - one.activation_bytes for one in whole.phases)
    most = max(one.activation_bytes for one in whole.phases)
    budget = Limits.exactly(device_memory=held + most * 5 // 2 - 1)
    plan = session.make_plan(network, budget, work, machine, forecast=True)
    assert plan.kind == "direct"
    monkeypatch.setattr("overflowml_core.batches.batch.attachment", lambda pipe: SimpleNamespace(plan=plan))
    assert [len(batch) for batch in overflowml.auto_batch(range(10), object())] == [4, 4, 2]
    assert [len(batch) for batch in overflowml.auto_batch(range(7), object(), max_batch_size=3)] == [3, 3, 1]
