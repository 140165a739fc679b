"""Blocks of different sizes in one staging buffer: right in every order of calls, never a byte over the plan, and in few places."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overflowml_core.facts import Tier
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import TIMEOUT_S, Block, Job, Stack, job, on_meta, rows, same, save, settled, slots_budget, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device

HIDDEN = (16, 96, 32, 16, 64, 128, 16)
COUNT = len(HIDDEN)


def uneven(hidden: tuple[int, ...] = HIDDEN) -> Stack:
    module = stack(len(hidden))
    for index, size in enumerate(hidden):
        torch.manual_seed(index)
        module.blocks[index] = Block(16, size).eval().requires_grad_(False)
    return module


def with_staging(task: Job, folder: Path, share: float) -> Engine:
    """All blocks streamed through a buffer between the largest of them and all of them."""
    plan = task.plan()
    phase = plan.phases[0]
    tier = Tier.DISK if task.tier == "disk" else Tier.PINNED if task.tier == "pinned" else Tier.RAM
    placements = tuple(p if p.tier is not Tier.DEVICE else dataclasses.replace(p, tier=tier, home=tier) for p in phase.placements)
    sizes = [p.stored_bytes for p in placements]
    staging_bytes = max(sizes) + int(share * (sum(sizes) - max(sizes)))
    phase = dataclasses.replace(phase, placements=placements, staging_bytes=staging_bytes, slot_bytes=max(sizes))
    return task.engine(folder, dataclasses.replace(plan, phases=(phase,), fingerprint="")).attach(task.modules, None)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, COUNT - 1), max_size=9), min_size=1, max_size=3),
    st.floats(0, 1),
    st.sampled_from(["pinned", "ram", "disk", "mixed"]),
)
def test_any_sequence_of_orders_is_right_in_a_buffer_of_any_size(
    tmp_path: Path, vgpu: Virtual, orders: list[list[int]], share: float, tier: str
) -> None:
    """The virtual accelerator carries copies out as late as it may, and raises where two uses of a byte are in no order."""
    vgpu.reset()
    module = uneven()
    every = [list(range(COUNT)), *orders, list(range(COUNT))]
    expected = []
    for order in every:
        module.order = order
        expected.append(on_device(module, rows()))
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 1), tier=tier)
    engine = with_staging(task, tmp_path, share)
    try:
        for order, right in zip(every, expected, strict=True):
            module.order = order
            assert same(call(module, rows()), right)
    finally:
        engine.detach()


@pytest.mark.parametrize("share", [0.0, 0.35, 0.8])
def test_the_buffer_is_what_the_plan_says_and_blocks_have_few_places(share: float, tmp_path: Path, vgpu: Virtual) -> None:
    module = uneven()
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 1))
    engine = with_staging(task, tmp_path, share)
    (phase,) = engine.plan.phases
    assert vgpu.taken_bytes == engine.device.arenas.held_bytes == phase.device_bytes
    for _ in range(8):
        call(module, rows())
    smallest = min(p.stored_bytes for p in phase.placements)
    assert max(map(len, places_of(engine))) <= phase.staging_bytes // smallest
    assert engine.device.arenas.peak_bytes == phase.device_bytes
    settled(engine)
    engine.detach()
    assert vgpu.taken_bytes == 0


def places_of(engine: Engine) -> list[dict[int, object]]:
    """Per block, its slots by their first byte."""
    return list(engine._phases[0].streamer._known)


def test_a_block_that_overwrites_two_comes_in_two_copies(tmp_path: Path, vgpu: Virtual) -> None:
    module = uneven((32, 32, 64, 32, 32, 64))
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 1))
    engine = with_staging(task, tmp_path, 0.0)
    call(module, rows())
    before = [entry.op for entry in vgpu.sim.log].count("copy_h2d")
    call(module, rows())
    copies = [entry.op for entry in vgpu.sim.log].count("copy_h2d") - before
    assert copies == 1 + 4 + 2 * 2  # the rows, four small blocks, two large ones
    engine.detach()


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("spare_bytes", [0, 2**20])
def test_files_are_read_straight_into_a_buffer_in_ram(share: float, spare_bytes: int, tmp_path: Path) -> None:
    module = uneven((5000, 9000, 2500, 5000, 2500))
    path = save(dict(module.named_parameters()), tmp_path / "model.safetensors")
    expected = module(rows())
    twin, loading = on_meta(module, path)
    task = job(twin, HostDevice(), tier="disk", loading=loading, budget_bytes=slots_budget(module, 1))
    plan = task.plan()
    (phase,) = plan.phases
    sizes = [p.stored_bytes for p in phase.placements]
    placements = tuple(dataclasses.replace(p, tier=Tier.DISK, home=Tier.DISK) for p in phase.placements)
    staging_bytes = max(sizes) + int(share * (sum(sizes) - max(sizes)))
    phase = dataclasses.replace(phase, placements=placements, staging_bytes=staging_bytes, slot_bytes=max(sizes))
    budget = dataclasses.replace(plan.budget, device_bytes=phase.device_bytes + spare_bytes)
    plan = dataclasses.replace(plan, phases=(phase,), budget=budget, fingerprint="")
    engine = task.engine(tmp_path / "store", plan).attach(task.modules, loading)
    for _ in range(4):
        assert same(twin(rows()), expected)
    starts = [start for places in places_of(engine) for start in places]
    if spare_bytes:
        assert all(start % 4096 == 0 for start in starts)
    engine._phases[0].streamer.close()
    assert engine.device.arenas.peak_bytes <= budget.device_bytes
    engine.detach()


def test_a_copy_waits_for_what_a_read_under_way_put_an_end_to(tmp_path: Path, vgpu: Virtual) -> None:
    """The first half of block 0 goes to a block from disk, the second to one from RAM, whose copy is queued before that of the other."""
    module = uneven((64, 64, 32, 32))
    expected = [on_device(block, rows()) for block in module.blocks]
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 1), tier="disk")
    plan = task.plan()
    (phase,) = plan.phases
    tiers = (Tier.PINNED, Tier.PINNED, Tier.DISK, Tier.PINNED)
    placements = tuple(dataclasses.replace(p, tier=tier, home=tier) for p, tier in zip(phase.placements, tiers, strict=True))
    size = placements[0].stored_bytes
    assert [p.stored_bytes for p in placements] == [size, size, size // 2, size // 2]
    phase = dataclasses.replace(phase, placements=placements, staging_bytes=2 * size, slot_bytes=size)
    engine = task.engine(tmp_path, dataclasses.replace(plan, phases=(phase,), fingerprint=""))
    read, gate = engine._reader.read, threading.Event()

    def gated(*args: object) -> None:
        assert gate.wait(TIMEOUT_S)
        read(*args)

    engine._reader.read = gated  # type: ignore[method-assign]
    gate.set()
    engine.attach(task.modules, None)
    gate.clear()
    try:
        assert same(call(module.blocks[0], rows()), expected[0])
        gate.set()
        for k in (1, 2, 3):
            assert same(call(module.blocks[k], rows()), expected[k])
    finally:
        gate.set()
        engine.detach()
