"""From one plan to another between passes: outputs stay the same, no byte too many is taken, nothing is lost when it fails half-way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overflowml_core.errors import PlanMismatch, ReadFault, Unsupported
from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import Block, Stack, job, on_meta, rows, same, save, settled, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device
from tests.vdevice import Faults

RAM_TIERS = ["pinned", "ram"]


def arranged(plan: Plan, stays: list[bool], slot_count: int, home: Tier, index: int = 0) -> Plan:
    """The plan with these residents in one of its phases; what is streamed, or waits for its phase, waits in ``home``."""
    phase = plan.phases[index]
    alone = len(plan.phases) == 1
    placements = tuple(
        replace(p, tier=Tier.DEVICE if stay else home, home=Tier.DEVICE if stay and alone else home)
        for p, stay in zip(phase.placements, stays, strict=True)
    )
    streamed = [p.stored_bytes for p in placements if p.tier is not Tier.DEVICE]
    slots = min(slot_count, len(streamed))
    made = replace(phase, placements=placements, staging_bytes=slots * max(streamed, default=0), slot_bytes=max(streamed, default=0))
    return replace(plan, strategy="stream", phases=(*plan.phases[:index], made, *plan.phases[index + 1 :]), fingerprint="")


def residents(phase: PhasePlan) -> int:
    return sum(p.tier is Tier.DEVICE for p in phase.placements)


def staging_taken(engine: Engine) -> int:
    return sum(phase.streamer.staging_bytes for phase in engine._phases)


@pytest.mark.parametrize("tier", [*RAM_TIERS, "disk"])
def test_outputs_stay_and_the_budget_holds_under_every_plan(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16, bias=True, ends=True)
    expected, before = on_device(module, rows()), snapshot(module)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3) + 4096, reserve_bytes=4096, tier=tier)
    home = Tier(tier)
    with task.attached(tmp_path) as engine:
        vgpu.limit(task.budget_bytes)
        draw = random.Random(0)
        for kept, slots in [(3, 2), (2, 3), (0, 4), (4, 1), (0, 1), (1, 2), (3, 2)]:
            stays = draw.sample([True] * kept + [False] * (6 - kept), 6)
            plan = arranged(engine.plan, stays, slots, home)
            engine.rearrange(plan)
            assert (engine.plan, residents(engine.plan.phases[0]), staging_taken(engine)) == (plan, kept, plan.phases[0].staging_bytes)
            for _ in range(3):
                assert same(call(module, rows()), expected)
            assert vgpu.taken_bytes == plan.phases[0].device_bytes - 4096
            assert vgpu.peak_bytes <= task.budget_bytes
            settled(engine)
            streamed = sum(p.stored_bytes for p in plan.phases[0].streamed)
            assert engine.report().streamed_bytes >= streamed
            if tier == "pinned":
                assert vgpu.device.pinned.held_bytes == streamed
    assert snapshot(module) == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_ram_never_holds_more_than_under_one_of_both_plans_and_a_block(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(8, 16)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 4))
    size = task.network.components[0].blocks[0].slab_bytes
    with task.attached(tmp_path) as engine:
        engine.rearrange(arranged(engine.plan, [True] * 4 + [False] * 4, 2, Tier.PINNED))
        vgpu.device.pinned.reset_peak()
        vgpu.limit(task.budget_bytes)
        engine.rearrange(arranged(engine.plan, [False] * 4 + [True] * 4, 2, Tier.PINNED))
        assert vgpu.device.pinned.peak_bytes <= 5 * size
        assert vgpu.peak_bytes <= task.budget_bytes


def test_weights_of_a_file_go_back_to_it_and_are_held_nowhere_else(tmp_path: Path) -> None:
    module = stack(6, 16)
    x = rows()
    with torch.no_grad():
        expected = module(x)
    path = save(module.state_dict(), tmp_path / "model.safetensors")
    twin, loading = on_meta(module, path)
    task = job(twin, budget_bytes=slots_budget(module, 1, 4), loading=loading)
    with torch.no_grad(), task.attached(tmp_path) as engine:
        for stays, slots in [([True] * 4 + [False] * 2, 1), ([False] * 6, 3), ([False, True] * 3, 2)]:
            plan = arranged(engine.plan, stays, slots, Tier.DISK)
            engine.rearrange(plan)
            assert same(twin(x), expected)
            assert same(twin(x), expected)
            held = sum(stays) * plan.phases[0].placements[0].stored_bytes
            assert engine.device.arenas.held_bytes >= held
            assert engine.device.arenas.peak_bytes <= task.budget_bytes
            assert engine.device.pageable.held_bytes == 0
    assert all(same(a, b) for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True))


def test_what_was_written_into_a_resident_moves_with_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 2)).attached(tmp_path) as engine:
        engine.rearrange(arranged(engine.plan, [True, False, True, False], 2, Tier.PINNED))
        with torch.no_grad():
            module.blocks[0].up.weight.fill_(0.25)
        engine.rearrange(arranged(engine.plan, [False, False, True, False], 2, Tier.PINNED))
        assert torch.equal(module.state_dict()["blocks.0.up.weight"], torch.full((16, 16), 0.25))
    assert torch.equal(module.blocks[0].up.weight, torch.full((16, 16), 0.25))


def test_phases_that_take_turns_change_one_by_one(tmp_path: Path, vgpu: Virtual) -> None:
    modules = {"encoder": stack(4, 16, seed=1, ends=True), "transformer": stack(6, 16, seed=2, hidden=24, ends=True)}
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    task = job(modules, vgpu.device, budget_bytes=slots_budget(modules["transformer"], 2, 2) + 4096, reserve_bytes=4096)
    with task.attached(tmp_path) as engine:
        vgpu.limit(task.budget_bytes)
        for index, stays in [(1, [False] * 6), (0, [False, True, False, False]), (1, [True, False] * 2 + [False] * 2)]:
            engine.rearrange(arranged(engine.plan, stays, 2, Tier.PINNED, index))
            for name in ("encoder", "transformer", "transformer", "encoder"):
                assert same(call(modules[name], rows()), expected[name])
            assert [residents(p) for p in engine.plan.phases][index] == sum(stays)
        assert vgpu.peak_bytes <= task.budget_bytes
    assert {name: snapshot(m) for name, m in modules.items()} == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


@pytest.mark.parametrize("calls", range(1, 13))
def test_a_failure_half_way_leaves_the_former_plan(calls: int, tmp_path: Path, vgpu: Virtual) -> None:
    """Every allocation in turn fails; the way back needs no luck, for what comes back was there before."""
    module = stack(6, 16, ends=True)
    expected, before = on_device(module, rows()), snapshot(module)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3) + 4096, reserve_bytes=4096).attached(tmp_path) as engine:
        former = arranged(engine.plan, [True, True, True, False, False, False], 2, Tier.PINNED)
        engine.rearrange(former)
        vgpu.sim.faults = Faults(alloc={calls})
        wanted = arranged(engine.plan, [False, False, False, True, True, False], 2, Tier.PINNED)
        try:
            engine.rearrange(wanted)
        except torch.OutOfMemoryError:
            assert engine.plan == former
        else:
            assert engine.plan == wanted
        vgpu.sim.faults = Faults()
        for _ in range(2):
            assert same(call(module, rows()), expected)
    assert snapshot(module) == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_some_allocation_does_fail_in_the_test_above(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        engine.rearrange(arranged(engine.plan, [True, True, True, False, False, False], 2, Tier.PINNED))
        vgpu.sim.faults = Faults(alloc={1})
        with pytest.raises(torch.OutOfMemoryError):
            engine.rearrange(arranged(engine.plan, [False, False, False, True, True, False], 2, Tier.PINNED))
        vgpu.sim.faults = Faults()


def test_two_failures_leave_a_plan_of_what_is_where(tmp_path: Path, vgpu: Virtual) -> None:
    """The second one on the way back: blocks stay where they are, and the model runs from there."""
    module = stack(6, 16)
    expected = on_device(module, rows())
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3) + 4096, reserve_bytes=4096).attached(tmp_path) as engine:
        engine.rearrange(arranged(engine.plan, [True, True, True, False, False, False], 2, Tier.PINNED))
        vgpu.sim.faults = Faults(alloc=range(3, 6))
        with pytest.raises(torch.OutOfMemoryError):
            engine.rearrange(arranged(engine.plan, [False, False, False, True, True, True], 3, Tier.PINNED))
        vgpu.sim.faults = Faults()
        for _ in range(2):
            assert same(call(module, rows()), expected)
        assert engine.plan.check().estimate is not None


def test_a_file_that_was_cut_leaves_the_former_plan(tmp_path: Path) -> None:
    module = stack(4, 16)
    path = save(module.state_dict(), tmp_path / "model.safetensors")
    twin, loading = on_meta(module, path)
    task = job(twin, budget_bytes=slots_budget(module, 1, 2), loading=loading)
    with task.attached(tmp_path) as engine:
        former = arranged(engine.plan, [True, True, False, False], 1, Tier.DISK)
        engine.rearrange(former)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 2000)
        with pytest.raises(ReadFault):
            engine.rearrange(arranged(engine.plan, [True, False, False, True], 1, Tier.DISK))
        assert [p.tier for p in engine.plan.placements()] == [p.tier for p in former.placements()]


def test_plans_for_something_else_are_refused(tmp_path: Path, vgpu: Virtual) -> None:
    module, other = stack(4, 16), stack(5, 16)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1))
    with task.attached(tmp_path) as engine:
        present = engine.plan
        with pytest.raises(PlanMismatch, match="other blocks or formats"):
            engine.rearrange(job(other, vgpu.device, budget_bytes=slots_budget(other, 2, 1)).plan())
        two = job({"model": module, "b": other}, vgpu.device).plan()
        with pytest.raises(PlanMismatch, match="in 2 phases"):
            engine.rearrange(two)
        converted = replace(present.phases[0], placements=tuple(replace(p, format="fp8") for p in present.phases[0].placements))
        with pytest.raises(PlanMismatch, match="formats"):
            engine.rearrange(replace(present, phases=(converted,), fingerprint=""))
        assert engine.plan is present
    with pytest.raises(Unsupported, match="given back"):
        engine.rearrange(present)


def test_weights_that_were_added_keep_their_room(tmp_path: Path, vgpu: Virtual) -> None:
    """An adapter takes what the plan left over, or has residents make room: another plan would not know of it."""
    module = stack(4, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        module.blocks[1].adapter = torch.nn.Linear(4, 4)
        with pytest.raises(Unsupported, match="added"):
            engine.rearrange(arranged(engine.plan, [False] * 4, 3, Tier.PINNED))


def test_blocks_of_unequal_sizes_find_their_slots(tmp_path: Path, vgpu: Virtual) -> None:
    module = Stack(5, 16).eval().requires_grad_(False)
    for i, hidden in enumerate((16, 64, 32, 16, 48)):
        module.blocks[i] = Block(16, hidden).eval().requires_grad_(False)
    expected = on_device(module, rows())
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1) + 8192, reserve_bytes=8192)
    with task.attached(tmp_path) as engine:
        vgpu.limit(task.budget_bytes)
        for stays, slots in [([False, True, False, False, False], 2), ([True, False, False, True, False], 2), ([False] * 5, 1)]:
            engine.rearrange(arranged(engine.plan, stays, slots, Tier.PINNED))
            assert same(call(module, rows()), expected)
