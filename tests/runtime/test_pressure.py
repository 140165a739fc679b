"""The guard and the watches of batches on the virtual accelerator: real allocations, real garbage, another program's share."""

from __future__ import annotations

import gc

import pytest
import torch

from overflowml_core.batches import BatchSizer
from overflowml_core.batches.batch import batches
from overflowml_core.batches.measure import BudgetWatch, RoomWatch
from overflowml_core.guard import MemoryGuard
from overflowml_core.runtime.pressure import read_devices

KIB = 1024


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.data, self.me = torch.empty(nbytes, dtype=torch.uint8, device=device), self


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def test_a_device_counts_with_all_that_is_taken_of_it(vgpu):
    vgpu.limit(1024 * KIB)
    held = torch.empty(256 * KIB, dtype=torch.uint8, device="vgpu")
    (reading,) = read_devices()
    assert reading.name == "vgpu:0"
    assert reading.total_bytes - reading.free_bytes == reading.used_bytes
    assert reading.held_bytes - vgpu.base_bytes == held.numel()


def test_a_crowded_device_is_cleaned_between_iterations(vgpu, no_collector):
    vgpu.limit(1024 * KIB)
    guard = MemoryGuard(0.7)
    for _ in range(6):
        with guard:
            Cycle(vgpu.device.torch_device, 300 * KIB)  # three of them fill 0.88 of the device
    assert vgpu.taken_bytes <= 600 * KIB
    assert guard.freed_device_bytes >= 900 * KIB
    assert guard.last is not None
    assert "vgpu:0" in guard.last.crowded


def test_without_the_guard_the_same_loop_runs_out_of_memory(vgpu, no_collector):
    vgpu.limit(1024 * KIB)
    for _ in range(3):
        Cycle(vgpu.device.torch_device, 300 * KIB)
    with pytest.raises(torch.OutOfMemoryError):
        Cycle(vgpu.device.torch_device, 300 * KIB)
    gc.collect()


def test_a_driver_that_fails_is_a_warning_and_no_error(vgpu, monkeypatch, caplog):
    held = torch.empty(KIB, dtype=torch.uint8, device="vgpu")
    monkeypatch.setattr(torch.vgpu, "mem_get_info", lambda index: (_ for _ in ()).throw(RuntimeError("driver died")))
    with MemoryGuard(0.7):
        pass
    assert "driver died" in caplog.text
    assert held.numel() == KIB


def _run(count: int, item_bytes: int) -> None:
    torch.empty(count * item_bytes, dtype=torch.uint8, device="vgpu")


def test_batches_grow_only_as_far_as_what_they_took_leaves_room(vgpu):
    vgpu.limit(1000 * KIB)
    sizes = []
    for batch in batches(range(40), BatchSizer(1, 64), RoomWatch()):
        with batch:
            _run(len(batch), 100 * KIB)
            sizes.append(len(batch))
    assert sizes == [1, 1, 2, 2, 4, 4, 8, 8, 9, 1]


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(vgpu):
    vgpu.limit(1000 * KIB)
    done, sizes = [], []
    for batch in batches(range(24), BatchSizer(16, 16)):
        with batch:
            sizes.append(len(batch))
            _run(len(batch), 100 * KIB)
            done += batch
    assert done == list(range(24))
    assert sizes[:2] == [16, 8]


def test_a_batch_over_the_budget_is_the_last_of_its_size(vgpu):
    vgpu.limit(1000 * KIB)
    watch = BudgetWatch("vgpu", vgpu.base_bytes + 500 * KIB)
    sizes = []
    for batch in batches(range(30), BatchSizer(8, 8), watch):
        _run(len(batch), 100 * KIB)
        sizes.append(len(batch))
    assert sizes[:2] == [8, 4]
