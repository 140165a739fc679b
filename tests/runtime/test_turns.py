"""Threads with one model whose phases take turns: results are right, nobody waits for ever, and nothing leaves under a call."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.device import Device, HostDevice
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.phase import Stay
from tests.runtime.build import TIMEOUT_S, Stack, in_threads, job, rows, same, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_order import run, run_plain


@pytest.fixture(params=[("vgpu", "pinned"), ("vgpu", "disk"), ("cpu", "disk")], ids=lambda p: f"{p[0]}-{p[1]}")
def place(request: pytest.FixtureRequest, vgpu: Virtual) -> tuple[Device, str]:
    where, tier = request.param
    return (vgpu.device if where == "vgpu" else HostDevice()), tier


def parts(count: int = 3) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {f"part{k}": stack(4, 16, seed=k, ends=True) for k in range(count)}
    modules["part0"].register_buffer("extra", torch.ones(3))
    return modules


class Gate(nn.Module):
    """Holds whoever calls it while it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.open = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.open.wait(TIMEOUT_S)
        return x


def gated(module: nn.Module) -> Gate:
    """A gate in the middle of a stack: behind its first block."""
    gate = Gate()
    module.blocks[0].register_forward_hook(lambda m, args, output: gate(output))
    return gate


def started(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread with what it gave or raised."""
    results: list[object] = []

    def run_it() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 -- looked at by the test
            results.append(error)

    thread = threading.Thread(target=run_it, daemon=True)
    thread.start()
    return thread, results


def ended(thread: threading.Thread) -> None:
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "a thread hangs"


def test_threads_in_different_phases_are_right_and_one_phase_is_there_at_a_time(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    modules = parts()
    expected = {name: run_plain(m, device) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    names = list(modules)
    with job(modules, device, tier=tier).attached(tmp_path) as engine:

        def work(index: int) -> None:
            for step in range(6):
                name = names[(index + step * (1 + index % 2)) % 3]
                assert same(run(modules[name], device), expected[name])
                assert sum(phase.stay is not Stay.AWAY for phase in list(engine._phases)) <= 1

        in_threads(4, work)
    assert {name: snapshot(m) for name, m in modules.items()} == before


def test_a_phase_does_not_leave_under_a_call(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    modules = parts(2)
    expected = {name: run_plain(m, device) for name, m in modules.items()}
    gate = gated(modules["part0"])
    with job(modules, device, tier=tier).attached(tmp_path) as engine:
        inside, first = started(lambda: run(modules["part0"], device))
        assert gate.reached.wait(TIMEOUT_S)
        waits, second = started(lambda: run(modules["part1"], device))
        time.sleep(0.05)
        assert engine._turns.present is engine._phases[0]
        assert not second
        gate.open.set()
        ended(inside)
        ended(waits)
    assert same(first[0], expected["part0"])  # type: ignore[arg-type]
    assert same(second[0], expected["part1"])  # type: ignore[arg-type]


def test_who_calls_again_and_again_lets_others_have_their_turn(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    modules = parts(2)
    is_over = threading.Event()

    def again() -> None:
        while not is_over.is_set():
            run(modules["part0"], device)

    with job(modules, device, tier=tier).attached(tmp_path):
        busy = [started(again) for _ in range(2)]
        try:
            for _ in range(3):
                one, results = started(lambda: run(modules["part1"], device))
                ended(one)
                assert isinstance(results[0], torch.Tensor)
        finally:
            is_over.set()
        for thread, results in busy:
            ended(thread)
            assert results == [None]


def test_a_part_that_is_called_by_itself_keeps_its_phase(tmp_path: Path, vgpu: Virtual) -> None:
    modules = parts(2)
    expected = run_plain(modules["part0"].blocks[1], vgpu.device)
    gate = Gate()
    with job(modules, vgpu.device).attached(tmp_path) as engine:
        modules["part0"].blocks[1].up.register_forward_hook(lambda m, args, output: gate(output))
        inside, first = started(lambda: run(modules["part0"].blocks[1], vgpu.device))
        assert gate.reached.wait(TIMEOUT_S)
        waits, second = started(lambda: run(modules["part1"], vgpu.device))
        time.sleep(0.05)
        assert engine._turns.present is engine._phases[0]
        gate.open.set()
        ended(inside)
        ended(waits)
    assert same(first[0], expected)  # type: ignore[arg-type]
    assert isinstance(second[0], torch.Tensor)


@pytest.mark.parametrize("what", ["whole", "blocks", "forward"])
def test_a_phase_does_not_leave_under_a_call_that_is_compiled_or_wrapped(what: str, tmp_path: Path) -> None:
    """``torch.compile`` of the whole or of its blocks, and a forward that others replaced on the instance, as accelerate does."""
    modules = parts(2)
    first, device = modules["part0"], HostDevice()
    expected = {name: run_plain(m, device) for name, m in modules.items()}
    gate = gated(first)
    with job(modules, device, tier="disk").attached(tmp_path) as engine:
        call: Callable[[torch.Tensor], torch.Tensor] = first
        if what == "whole":
            call = torch.compile(first, backend="eager")
        elif what == "blocks":
            for block in first.blocks:
                block.compile(backend="eager")
        else:
            true = first.forward
            first.forward = lambda *args, **kwargs: true(*args, **kwargs)
            call = first.forward  # past all hooks of the whole
        inside, results = started(lambda: call(rows()))
        assert gate.reached.wait(TIMEOUT_S)
        waits, others = started(lambda: run(modules["part1"], device))
        while not engine._turns._queue:
            time.sleep(0.001)
        time.sleep(0.02)
        assert engine._turns.present is engine._phases[0]
        gate.open.set()
        ended(inside)
        ended(waits)
    assert same(results[0], expected["part0"])  # type: ignore[arg-type]
    assert same(others[0], expected["part1"])  # type: ignore[arg-type]


def test_threads_that_wait_for_each_other_are_told(tmp_path: Path, vgpu: Virtual) -> None:
    """One is inside a block and calls another phase; the other waits for the block's bytes."""
    modules = parts(2)
    first, second = modules["part0"], modules["part1"]
    expected = run_plain(first, vgpu.device)
    inside = threading.local()

    def nested(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if getattr(inside, "nests", False):
            deadline = time.monotonic() + TIMEOUT_S
            while not any(_waits_for_a_slot(ident) for ident in sys._current_frames()):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            second(args[0])

    first.blocks[0].up.register_forward_pre_hook(nested)
    with job(modules, vgpu.device).attached(tmp_path):

        def nests() -> torch.Tensor:
            inside.nests = True
            return run(first, vgpu.device)

        one, refused = started(nests)
        two, result = started(lambda: run(first, vgpu.device))
        ended(one)
        ended(two)
        assert same(run(first, vgpu.device), expected)
    if isinstance(refused[0], Unsupported):
        assert "other threads wait" in str(refused[0])
        assert same(result[0], expected)  # type: ignore[arg-type]
    else:
        raise AssertionError(f"{refused[0]!r}, {result[0]!r}")


def _waits_for_a_slot(ident: int) -> bool:
    frame = sys._current_frames().get(ident)
    while frame is not None and frame.f_code.co_name != "_slot_for":
        frame = frame.f_back
    return frame is not None


def test_two_models_on_one_device_know_nothing_of_each_other(tmp_path: Path, vgpu: Virtual) -> None:
    pairs = [parts(2), parts(2)]
    expected = run_plain(pairs[0]["part1"], vgpu.device)
    with job(pairs[0], vgpu.device).attached(tmp_path), job(pairs[1], vgpu.device, tier="disk").attached(tmp_path):

        def work(index: int) -> None:
            for name in ("part1", "part0") * 3 + ("part1",):
                result = run(pairs[index % 2][name], vgpu.device)
            assert same(result, expected)

        in_threads(4, work)
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_a_server_of_coroutines_whose_calls_are_cancelled(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    modules = parts(2)
    expected = {name: run_plain(m, device) for name, m in modules.items()}

    async def serve() -> list[object]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(3) as pool:
            calls = [loop.run_in_executor(pool, run, modules[f"part{k % 2}"], device) for k in range(12)]
            for k in (3, 5, 9):
                calls[k].cancel()
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), TIMEOUT_S)

    with job(modules, device, tier=tier).attached(tmp_path):
        for k, result in enumerate(asyncio.run(serve())):
            assert isinstance(result, asyncio.CancelledError) or same(result, expected[f"part{k % 2}"])  # type: ignore[arg-type]
        assert all(same(run(modules[name], device), expected[name]) for name in modules)


# ---- the end, and changes of weights, while calls are under way


def test_the_end_waits_for_the_calls_of_other_threads(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    modules = parts(2)
    before = {name: snapshot(m) for name, m in modules.items()}
    expected = run_plain(modules["part0"], device)
    gate = gated(modules["part0"])
    engine = job(modules, device, tier=tier).attach(tmp_path)
    inside, first = started(lambda: run(modules["part0"], device))
    assert gate.reached.wait(TIMEOUT_S)
    enders = [started(engine.detach) for _ in range(2)]
    time.sleep(0.05)
    assert all(thread.is_alive() for thread, _ in enders)
    gate.open.set()
    for thread, _ in enders:
        ended(thread)
    assert sorted(results[0] for _, results in enders) == [False, True]  # type: ignore[type-var]
    ended(inside)
    assert same(first[0], expected)  # type: ignore[arg-type]
    engine.detach()
    assert {name: snapshot(m) for name, m in modules.items()} == before


def test_the_end_inside_a_call_is_refused_and_the_call_is_right(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(4, 16)
    expected, before = run_plain(module, device), snapshot(module)
    engine = job(module, device, budget_bytes=slots_budget(module, 2), tier=tier).attach(tmp_path)
    refusals: list[str] = []

    def end(*_: object) -> None:
        with pytest.raises(Unsupported) as caught:
            engine.detach()
        refusals.append(str(caught.value))

    hook = module.blocks[2].register_forward_hook(end)
    assert same(run(module, device), expected)
    hook.remove()
    assert "inside a call" in refusals[0]
    assert same(run(module, device), expected)
    engine.detach()
    assert snapshot(module) == before


def test_a_call_that_waits_when_the_model_is_given_back_goes_on_with_plain_weights(tmp_path: Path) -> None:
    modules = parts(2)
    expected = modules["part1"](rows())
    gate = gated(modules["part0"])
    engine = job(modules, HostDevice(), tier="disk").attach(tmp_path)
    inside, _ = started(lambda: run(modules["part0"], HostDevice()))
    assert gate.reached.wait(TIMEOUT_S)
    end, ends = started(engine.detach)
    while not engine._turns._queue:
        time.sleep(0.001)
    waits, results = started(lambda: run(modules["part1"], HostDevice()))
    alone, blocks = started(lambda: run(modules["part1"].blocks[1], HostDevice()))
    while len(engine._turns._queue) < 3:
        time.sleep(0.001)
    gate.open.set()
    for thread in (inside, end, waits, alone):
        ended(thread)
    assert ends == [True]
    assert same(results[0], expected)  # type: ignore[arg-type]
    assert isinstance(blocks[0], torch.Tensor)


def test_weights_are_edited_when_nobody_computes_with_them(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(4, 16)
    old = run_plain(module, device)
    gate = gated(module)

    def edit(engine: Engine) -> None:
        with engine.editing(module.blocks[3]), torch.no_grad():
            module.blocks[3].up.weight.mul_(2)

    with job(module, device, budget_bytes=slots_budget(module, 2), tier=tier).attached(tmp_path) as engine:
        inside, results = started(lambda: run(module, device))
        assert gate.reached.wait(TIMEOUT_S)
        editor, edits = started(lambda: edit(engine))
        time.sleep(0.05)
        assert editor.is_alive()
        gate.open.set()
        ended(inside)
        ended(editor)
        assert edits == [None]
        assert same(results[0], old)  # type: ignore[arg-type]
        new = run(module, device)
    assert not same(new, old)
    assert same(new, run_plain(module, device))


def test_another_plan_is_refused_while_another_thread_computes(tmp_path: Path, vgpu: Virtual) -> None:
    module: Stack = stack(4, 16)
    gate = gated(module)
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1))
    with task.attached(tmp_path) as engine:
        inside, results = started(lambda: run(module, vgpu.device))
        assert gate.reached.wait(TIMEOUT_S)
        with pytest.raises(Unsupported, match="another thread computes"):
            engine.rearrange(engine.plan)
        gate.open.set()
        ended(inside)
        assert isinstance(results[0], torch.Tensor)
        engine.rearrange(engine.plan)
