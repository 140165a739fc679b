"""When things happen, on the simulated clock: copies run while blocks compute, and a pass takes what the slower of both takes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.runtime.build import Stack, job, settled, slots_budget, stack
from tests.runtime.conftest import Virtual

WIDTH, ROWS = 64, 32
BLOCK_BYTES = WIDTH * WIDTH * 4
FLOP = 2 * ROWS * WIDTH * WIDTH
MS = 1e-3


def clocked(vgpu: Virtual, copy_s: float, compute_s: float) -> None:
    """A block's copy takes so long, its product so long, everything else nothing."""
    vgpu.reset(h2d_bytes_per_s=BLOCK_BYTES / copy_s, flop_per_s=FLOP / compute_s, memory_bytes_per_s=1e30)


def managed(vgpu: Virtual, folder: Path, count: int, slots: int, resident: int = 0, tier: str = "pinned"):
    module = stack(count, WIDTH)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, slots, resident), tier=tier).attach(folder)
    phase = engine.plan.phases[0]
    assert (phase.slot_count, count - len(phase.streamed)) == (slots, resident)
    return module, engine


def passes(vgpu: Virtual, module: Stack, count: int) -> list[float]:
    """Seconds of each pass, once all is in its rhythm."""
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    module(x)
    ends = []
    for _ in range(count + 1):
        module(x)
        ends.append(vgpu.sim.clock.streams[0].time_s)
    return [after - before for before, after in pairwise(ends)]


@pytest.mark.parametrize(("copy_ms", "compute_ms"), [(1.0, 0.25), (0.25, 1.0), (1.0, 1.0)])
def test_with_two_slots_a_pass_takes_the_longer_of_copies_and_products(
    copy_ms: float, compute_ms: float, tmp_path: Path, vgpu: Virtual
) -> None:
    clocked(vgpu, copy_ms * MS, compute_ms * MS)
    module, engine = managed(vgpu, tmp_path, 6, 2)
    assert passes(vgpu, module, 4) == pytest.approx([6 * max(copy_ms, compute_ms) * MS] * 4, rel=1e-9)
    engine.detach()


def test_with_one_slot_a_pass_takes_the_sum(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 1 * MS, 0.5 * MS)
    module, engine = managed(vgpu, tmp_path, 6, 1)
    assert passes(vgpu, module, 3) == pytest.approx([6 * 1.5 * MS] * 3, rel=1e-9)
    engine.detach()


def test_residents_between_streamed_blocks_hide_the_copies(tmp_path: Path, vgpu: Virtual) -> None:
    """Every second block stays: a copy of one unit hides behind two products of half a unit."""
    clocked(vgpu, 1 * MS, 0.5 * MS)
    module, engine = managed(vgpu, tmp_path, 12, 2, 6)
    resident = [p.tier.value == "device" for p in engine.plan.phases[0].placements]
    assert all(a != b for a, b in pairwise(resident))
    assert passes(vgpu, module, 3) == pytest.approx([12 * 0.5 * MS] * 3, rel=1e-9)
    engine.detach()


def test_the_last_block_of_a_pass_brings_the_first_of_the_next(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 1 * MS, 0.25 * MS)
    module, engine = managed(vgpu, tmp_path, 4, 2)
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    module(x)
    vgpu.sim.synchronize()
    assert [slot.k for slot in engine._phases[0].streamer._live] == [0, 1]
    copied = len([e for e in vgpu.sim.log if e.engine == "h2d"])
    assert copied == 2 + 4  # two before the first pass, one behind each block
    before = vgpu.sim.elapsed()
    module(x)
    products = [e for e in vgpu.sim.log if e.op == "aten::mm"][-4:]
    assert products[0].start_s == before  # it was there already
    engine.detach()


def test_copies_begin_in_the_order_of_the_blocks_and_each_before_the_block_in_front_ends(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 0.5 * MS, 1 * MS)
    module, engine = managed(vgpu, tmp_path, 6, 2)
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    module(x)
    first = len(vgpu.sim.log)
    module(x)
    log = vgpu.sim.log[first:]
    copies, products = ([e for e in log if e.engine == "h2d"], [e for e in log if e.op == "aten::mm"])
    assert (len(copies), len(products)) == (6, 6)
    for k in range(5):
        # The k-th copy here is that of block k + 2, into the slot of block k.
        assert products[k].end_s <= copies[k].start_s < products[k + 1].end_s
    engine.detach()


def test_a_block_moves_as_one_copy_whatever_it_holds(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, WIDTH, hidden=32, bias=True)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attach(tmp_path)
    module(torch.zeros(ROWS, WIDTH, device="vgpu"))
    before = [e.op for e in vgpu.sim.log].count("copy_h2d")
    for _ in range(3):
        module(torch.zeros(ROWS, WIDTH, device="vgpu"))
    assert [e.op for e in vgpu.sim.log].count("copy_h2d") - before == 3 * 4
    engine.detach()


def test_an_odd_number_of_streamed_blocks_copies_no_block_twice_in_a_pass(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 1 * MS, 0.25 * MS)
    module, engine = managed(vgpu, tmp_path, 5, 2)
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    module(x)
    for _ in range(3):
        before = engine._phases[0].streamer.streamed_bytes
        module(x)
        assert engine._phases[0].streamer.streamed_bytes - before <= 5 * BLOCK_BYTES
    assert engine.report().streamed_bytes <= 6 * BLOCK_BYTES
    engine.detach()


@pytest.mark.parametrize(("count", "slots"), [(5, 2), (7, 2), (7, 3), (8, 3)])
def test_any_number_of_blocks_takes_no_longer_than_their_copies(count: int, slots: int, tmp_path: Path, vgpu: Virtual) -> None:
    """The last block of a pass and the first of the next never share a slot."""
    clocked(vgpu, 1 * MS, 1 * MS)
    module = stack(count, WIDTH)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2))
    plan = task.plan()
    phase = dataclasses.replace(plan.phases[0], staging_bytes=slots * plan.phases[0].slot_bytes)
    engine = task.engine(tmp_path, dataclasses.replace(plan, phases=(phase,), fingerprint="")).attach(task.modules, None)
    assert passes(vgpu, module, 4) == pytest.approx([count * MS] * 4, rel=1e-9)
    engine.detach()


def test_another_order_is_learned_in_one_pass(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 1 * MS, 1 * MS)
    module, engine = managed(vgpu, tmp_path, 6, 2)
    module.order = [1, 0, 3, 2, 5, 4]
    assert passes(vgpu, module, 3) == pytest.approx([6 * MS] * 3, rel=1e-9)
    engine.detach()


def test_blocks_that_are_left_out_are_no_longer_copied_once_that_is_known(tmp_path: Path, vgpu: Virtual) -> None:
    module, engine = managed(vgpu, tmp_path, 6, 2)
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    module.order = [0, 1, 4, 5]
    for _ in range(2):
        module(x)
    before = engine._phases[0].streamer.streamed_bytes
    module(x)
    assert engine._phases[0].streamer.streamed_bytes - before == 4 * BLOCK_BYTES
    engine.detach()


def test_blocks_from_disk_pass_the_ring_while_others_compute(tmp_path: Path, vgpu: Virtual) -> None:
    clocked(vgpu, 1 * MS, 0.25 * MS)
    module, engine = managed(vgpu, tmp_path, 6, 2, tier="disk")
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    for _ in range(3):
        module(x)
    settled(engine)
    vgpu.sim.synchronize()
    copies = [e for e in vgpu.sim.log if e.engine == "h2d"]
    assert len(copies) == 2 + 3 * 6
    assert all(e.end_s - e.start_s == pytest.approx(1 * MS) for e in copies)
    assert vgpu.sim.elapsed() < (2 + 18) * 1.25 * MS
    engine.detach()


@pytest.mark.parametrize(("copy_ms", "compute_ms"), [(1.0, 0.25), (0.25, 1.0)])
def test_copies_from_pageable_memory_run_while_blocks_compute(copy_ms: float, compute_ms: float, tmp_path: Path, vgpu: Virtual) -> None:
    """The thread that calls the model is not held by them: a reader thread is."""
    clocked(vgpu, copy_ms * MS, compute_ms * MS)
    module, engine = managed(vgpu, tmp_path, 6, 2, tier="ram")
    before = vgpu.sim.clock.host_s
    assert passes(vgpu, module, 4) == pytest.approx([6 * max(copy_ms, compute_ms) * MS] * 4, rel=0.05)
    assert vgpu.sim.clock.host_s == before
    settled(engine)
    engine.detach()


def test_passes_and_bytes_are_reported(tmp_path: Path, vgpu: Virtual) -> None:
    module, engine = managed(vgpu, tmp_path, 6, 2)
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    for _ in range(100):
        module(x)
    report = engine.report()
    assert engine._phases[0].streamer.pass_count == 100
    assert report.streamed_bytes == (100 * 6 + 2) * BLOCK_BYTES // 100
    assert report.pinned_bytes == 6 * BLOCK_BYTES
    engine.detach()
