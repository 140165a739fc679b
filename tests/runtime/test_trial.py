"""Trials on a live engine: what they keep against an exhaustive sweep, and that nobody notices them but by the time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.trials import cases, run_case, steady_s
from overflowml_core import session
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import BlockWork, Limits, PassProfile, Rates, Work, Workload
from overflowml_core.inspect.calibration import apply_calibration, save_calibration
from overflowml_core.machine import ComputeRate, Machine
from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import Plan
from overflowml_core.planner.trial import Contest
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.stopwatch import kind_of
from overflowml_core.runtime.trial import Trial
from tests.runtime.build import Job, Stack, job, on_meta, rows, same, save, settled, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_rearrange import arranged
from tests.runtime.test_streaming import call, on_device

H2D_BYTES_PER_S, FLOP_PER_S = 1e8, 1e9


class Played:
    """A contest whose plans are written down beforehand."""

    def __init__(self, engine: Engine, plans: Sequence[Plan], component: str = "model") -> None:
        self.running = engine.plan
        self.heard: list[MeasuredPass] = []
        self.refused = self.closed = False
        self._plans = list(plans)
        self._component = component

    @property
    def components(self) -> frozenset[str]:
        return frozenset() if self.refused or self.closed or len(self.heard) > len(self._plans) else frozenset({self._component})

    @property
    def lessons(self) -> tuple[MeasuredPass, ...]:
        return tuple(self.heard)

    @property
    def pass_s(self) -> float | None:
        return self.heard[-1].pass_s if self.heard else None

    def hear(self, measured: MeasuredPass) -> Plan:
        self.heard.append(measured)
        if len(self.heard) <= len(self._plans):
            self.running = self._plans[len(self.heard) - 1]
        return self.running

    def close(self) -> Plan:
        self.closed = True
        return self.running

    def refuse(self, plan: Plan) -> None:
        self.refused, self.running = True, plan


def hook_count(module: torch.nn.Module) -> int:
    return sum(len(inner._forward_hooks) + len(inner._forward_pre_hooks) for inner in module.modules())


def splits(plan: Plan, *kept: int) -> list[Plan]:
    from overflowml_core.facts import Tier

    count = len(plan.phases[0].placements)
    return [arranged(plan, [i < n for i in range(count)], 2, Tier.PINNED) for n in kept]


@pytest.mark.parametrize("case", list(cases(5, 4, most_blocks=6)), ids=lambda case: f"{case.link_off:.2f}-{case.compute_off:.2f}")
def test_what_is_kept_is_within_five_percent_of_the_best_split(case, tmp_path: Path, vgpu: Virtual) -> None:
    outcome = run_case(case, tmp_path)
    assert outcome.ratio <= 1.05
    # The sweep is simulated: so it says what the engine does.
    assert outcome.best_run_s == pytest.approx(outcome.best_s)
    assert outcome.kept_s == pytest.approx(outcome.kept_simulated_s)


def test_a_plan_that_is_as_bad_as_can_be_does_not_last(tmp_path: Path, vgpu: Virtual) -> None:
    (case,) = cases(1, 13, most_blocks=6)
    outcome = run_case(case, tmp_path, worst=True)
    assert outcome.planned_s > 1.05 * outcome.best_s
    assert outcome.ratio <= 1.05


def test_nobody_notices_it_but_by_the_time(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16, bias=True, ends=True)
    expected, before = on_device(module, rows()), snapshot(module)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3) + 4096, reserve_bytes=4096)
    with task.attached(tmp_path) as engine:
        vgpu.limit(task.budget_bytes)
        plans = splits(engine.plan, 1, 3, 0)
        contest, hooks = Played(engine, plans), hook_count(module)
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for passes in range(40):
            assert trial.is_over == (passes > 12)
            assert same(call(module, rows()), expected)
        assert len(contest.heard) == 4
        assert engine.plan == plans[-1]
        assert hook_count(module) == hooks + 2 * (6 - sum(p.tier.value != "device" for p in task.plan().placements()))
        assert engine.report().pass_s == contest.pass_s
        settled(engine)
    assert vgpu.peak_bytes <= task.budget_bytes
    assert snapshot(module) == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_it_measures_blocks_waits_and_copies(tmp_path: Path, vgpu: Virtual) -> None:
    vgpu.reset(h2d_bytes_per_s=H2D_BYTES_PER_S, flop_per_s=FLOP_PER_S, memory_bytes_per_s=1e30)
    module = stack(6, 32)
    x = torch.zeros(16, 32, device="vgpu")
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 2)).attached(tmp_path) as engine:
        contest = Played(engine, [])
        trial = Trial(engine, contest, lambda lessons: None).begin()
        while not trial.is_over:
            module(x)
        (measured,) = contest.heard
        compute_s = 2 * 16 * 32 * 32 / FLOP_PER_S
        assert sorted(b.block for b in measured.blocks) == [f"blocks.{i}" for i in range(6)]
        assert [b.compute_s for b in measured.blocks] == pytest.approx([compute_s] * 6)
        assert measured.h2d_bytes_per_s == pytest.approx(H2D_BYTES_PER_S)
        assert measured.outside_s == pytest.approx(0, abs=1e-12)
        assert measured.pass_s == pytest.approx(steady_s(vgpu.sim, module, x))
        assert measured.stall_s == pytest.approx(measured.pass_s - 6 * compute_s)


def test_passes_of_other_kinds_are_not_compared(tmp_path: Path, vgpu: Virtual) -> None:
    """A prefill before every answer, as a language model has it."""
    vgpu.reset(h2d_bytes_per_s=H2D_BYTES_PER_S, flop_per_s=FLOP_PER_S, memory_bytes_per_s=1e30)
    module = stack(6, 32)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 1, 3))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        while not trial.is_over:
            for count in (64, 1, 1, 1, 1):
                module(torch.zeros(count, 32, device="vgpu"))
        compute_s = 2 * 1 * 32 * 32 / FLOP_PER_S
        for measured in contest.heard:
            assert [b.compute_s for b in measured.blocks] == pytest.approx([compute_s] * 6)


def test_a_kind_that_does_not_come_again_ends_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 0, 1))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(4):
            call(module, rows())
        assert len(contest.heard) == 1
        for _ in range(70):
            call(module, rows(count=5))
        assert (trial.is_over, contest.closed) == (True, True)


def test_a_pass_that_fails_counts_for_nothing(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    expected = on_device(module, rows())
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 0))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(4):
            module.blocks[2].fault = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                call(module, rows())
            module.blocks[2].fault = None
        assert contest.heard == []
        while not trial.is_over:
            assert same(call(module, rows()), expected)
        assert all(len(measured.blocks) == 4 for measured in contest.heard)


def test_two_threads_at_once_end_it(tmp_path: Path, vgpu: Virtual) -> None:
    class Meeting(Stack):
        """Waits in the middle of its first pass until another one has begun."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entered.release()
            if threading.current_thread() is not threading.main_thread():
                proceed.acquire(timeout=20)
            return super().forward(x)

    entered, proceed = threading.Semaphore(0), threading.Semaphore(0)
    torch.manual_seed(0)
    module = Meeting(4, 16).eval().requires_grad_(False)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 0))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        other = threading.Thread(target=call, args=(module, rows()))
        other.start()
        entered.acquire(timeout=20)
        call(module, rows())
        assert trial.is_over
        proceed.release()
        other.join(20)
        assert not other.is_alive()
        assert contest.heard == []


def test_a_plan_that_cannot_be_carried_out_leaves_the_model_as_it_runs(tmp_path: Path, vgpu: Virtual, caplog) -> None:
    module, other = stack(4, 16), stack(5, 16)
    expected = on_device(module, rows())
    foreign = job(other, vgpu.device, budget_bytes=slots_budget(other, 2, 1)).plan()
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        plan, contest = engine.plan, Played(engine, [foreign])
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(6):
            assert same(call(module, rows()), expected)
        assert (trial.is_over, contest.refused, engine.plan) == (True, True, plan)
        assert "could not be run in a trial" in caplog.text


@pytest.mark.parametrize("compiled", ["blocks.1", ""])
def test_blocks_that_are_compiled_end_it(compiled: str, tmp_path: Path, vgpu: Virtual) -> None:
    """Also when that happens in the middle of it: no hook of the trial may get into the graph."""
    module = stack(4, 16)
    expected = on_device(module, rows())
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 0))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        call(module, rows())
        # What torch's Module.compile leaves behind; compiling itself would take seconds.
        part = module.get_submodule(compiled)
        vars(part)["_compiled_call_impl"] = part._call_impl
        assert same(call(module, rows()), expected)
        assert trial.is_over
        assert contest.heard == []


def test_somebody_else_who_rearranges_ends_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        contest = Played(engine, splits(engine.plan, 0))
        trial = Trial(engine, contest, lambda lessons: None).begin()
        call(module, rows())
        engine.rearrange(splits(engine.plan, 0)[0])
        call(module, rows())
        assert (trial.is_over, contest.heard) == (True, [])


def test_detaching_ends_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attached(tmp_path) as engine:
        trial = Trial(engine, Played(engine, splits(engine.plan, 0)), lambda lessons: None).begin()
        call(module, rows())
    assert trial.is_over
    assert hook_count(module) == 0


def test_phases_that_take_turns_are_tried_one_by_one(tmp_path: Path, vgpu: Virtual) -> None:
    vgpu.reset(h2d_bytes_per_s=H2D_BYTES_PER_S, flop_per_s=FLOP_PER_S, memory_bytes_per_s=1e30)
    modules = {"encoder": stack(4, 32, seed=1), "transformer": stack(6, 32, seed=2)}
    expected = {name: on_device(m, rows(32)) for name, m in modules.items()}
    task = job(modules, vgpu.device, budget_bytes=slots_budget(modules["transformer"], 2, 2) + 8192, reserve_bytes=8192)
    with task.attached(tmp_path) as engine:
        vgpu.limit(task.budget_bytes)
        contest = Contest(engine.plan, task.network, _measured(task.machine))
        assert contest.components == {"encoder", "transformer"}
        Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(4):
            for name, passes in (("encoder", 1), ("transformer", 6)):
                for _ in range(passes):
                    assert same(call(modules[name], rows(32)), expected[name])
        # The encoder has no pass that does not bring its phase in: nothing is known of it.
        assert contest.components == {"encoder"}
        assert any("transformer: measured" in reason for reason in engine.plan.reasons)
        assert vgpu.peak_bytes <= task.budget_bytes


def test_in_ram_the_disk_is_measured(tmp_path: Path) -> None:
    module = stack(6, 64, hidden=128)
    with torch.no_grad():
        expected = module(rows(64))
    twin, loading = on_meta(module, save(module.state_dict(), tmp_path / "model.safetensors"))
    task = job(twin, HostDevice(), budget_bytes=slots_budget(module, 2, 2), loading=loading)
    with torch.no_grad(), task.attached(tmp_path) as engine:
        contest = Contest(engine.plan, task.network, task.machine)
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(40):
            assert same(twin(rows(64)), expected)
        assert trial.is_over
        (lesson,) = contest.lessons
        assert lesson.disk_bytes_per_s > 0
        assert sum(b.compute_s for b in lesson.blocks) + lesson.outside_s + lesson.stall_s == pytest.approx(lesson.pass_s, rel=0.2)
        assert engine.device.arenas.peak_bytes <= task.budget_bytes


def test_kinds_are_told_apart_by_the_first_tensor() -> None:
    mask = torch.ones(1, 9)
    assert kind_of((), {"input_ids": torch.ones(1, 1), "attention_mask": mask}) == kind_of((torch.ones(1, 1),), {})
    assert kind_of((torch.ones(1, 7),), {}) != kind_of((torch.ones(1, 1),), {})
    assert kind_of((torch.ones(1, dtype=torch.int64),), {}) != kind_of((torch.ones(1),), {})
    assert kind_of((3,), {"x": None}) == ()


# ---- through the front door


def _measured(machine: Machine, **rates: float) -> Machine:
    found = Rates(1e9, 1e9, 1e9, "measured", memory_bytes_per_s=1e12, compute=(ComputeRate("matmul", "F32", 1e12),))
    return replace(machine, rates=replace(found, **rates))


def _profiled(task: Job) -> None:
    (component,) = task.network.components
    works = (BlockWork((Work("matmul", "F32", 10_000_000, 0),)),) * len(component.blocks)
    component = replace(component, profiles=(PassProfile("denoise", 30, 0, works, source="traced"),), passes=30)
    task.network = replace(task.network, components=(component,))


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Manages a stack in RAM, on a machine whose calibration says that its disk is slow; returns the attachment."""
    module = stack(6, 64, hidden=128)
    task = job(module, budget_bytes=slots_budget(module, 2, 2))
    _profiled(task)
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))
    machine = _measured(replace(task.machine, named=False), disk_bytes_per_s=1e6)
    save_calibration(machine, tmp_path / "cache")
    monkeypatch.setattr(session, "detect", lambda: machine)
    monkeypatch.setattr(session, "describe", lambda target, workload=None: task.network)

    def manage(trial: bool | None, plan: Plan | None = None):
        limits = Limits.exactly(device_memory=task.budget_bytes, reserve=0, trial=trial)
        attachment = session.manage(module, limits, Workload(), plan=plan)
        hooks = hook_count(module)
        with torch.no_grad():
            for _ in range(40):
                module(rows(64))
        return attachment, hooks > hook_count(module), machine, tmp_path / "cache"

    yield manage
    session.release(module)


def test_a_trial_corrects_the_calibration_and_tells_what_was_tried(managed) -> None:
    attachment, was_tried, machine, folder = managed(True)
    assert was_tried
    assert "model: measured, " in attachment.summary()
    assert attachment.report().pass_s > 0
    found = apply_calibration(machine, folder).rates
    # This disk is more than five times as fast, which is the most that is believed at once.
    assert found.disk_bytes_per_s == pytest.approx(5e6)
    assert found.compute == machine.rates.compute


def test_whoever_wants_none_has_none(managed) -> None:
    attachment, was_tried, machine, folder = managed(False)
    assert not was_tried
    assert apply_calibration(machine, folder).rates.disk_bytes_per_s == 1e6
    assert attachment.report().pass_s is None


def test_plans_that_are_close_are_tried_unasked(managed) -> None:
    _, was_tried, _, _ = managed(None)
    assert was_tried


def test_a_plan_that_is_handed_over_is_the_one_that_runs(managed, monkeypatch: pytest.MonkeyPatch) -> None:
    made = session.make_plan(session.describe(None), Limits.exactly(device_memory=200_000, reserve=0), Workload(), session.detect())
    attachment, was_tried, _, _ = managed(None, made)
    assert not was_tried
    assert attachment.plan is made


def test_a_cache_that_cannot_be_written_fails_no_pass(managed, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(*args: object) -> None:
        raise OverflowmlError("calibration: read-only")

    monkeypatch.setattr("overflowml_core.inspect.calibration.save_calibration", refuse)
    managed(True)
    assert "what a trial of plans taught is not kept" in caplog.text
