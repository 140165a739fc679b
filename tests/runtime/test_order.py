"""Calls that nobody foresaw: other orders, other threads, errors in the middle. Slower, and right."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.facts import Tier
from overflowml_core.runtime import streamer
from overflowml_core.runtime.device import Device, HostDevice
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import TIMEOUT_S, Stack, in_threads, job, rows, same, settled, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device

TIERS = ["pinned", "ram", "disk"]
COUNT = 6


@pytest.fixture(params=[("vgpu", tier) for tier in TIERS] + [("cpu", "disk")], ids=lambda p: f"{p[0]}-{p[1]}")
def place(request: pytest.FixtureRequest, vgpu: Virtual) -> tuple[Device, str]:
    where, tier = request.param
    return (vgpu.device if where == "vgpu" else HostDevice()), tier


def reference(module: Stack, order: list[int] | None, device: Device) -> torch.Tensor:
    module.order = order
    expected = on_device(module, rows()) if not device.on_host else module(rows())
    module.order = None
    return expected


def run(module: nn.Module, device: Device, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return module((rows() if x is None else x).to(device.torch_device)).cpu()


ORDERS = {
    "reverse": [5, 4, 3, 2, 1, 0],
    "twice in a row": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    "skipped": [0, 2, 4],
    "same slot": [0, 2, 4, 0, 2, 4],
    "only the last": [5],
    "none": [],
    "mixed": [3, 3, 0, 5, 1, 1, 4, 2, 0],
}


@pytest.mark.parametrize("slots", [1, 2])
def test_blocks_may_be_called_in_any_order(slots: int, place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(COUNT, 16, ends=True)
    expected = {name: reference(module, order, device) for name, order in ORDERS.items()}
    with job(module, device, budget_bytes=slots_budget(module, slots), tier=tier).attached(tmp_path):
        for name, order in [*ORDERS.items(), *ORDERS.items()]:
            module.order = order
            assert same(run(module, device), expected[name]), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, COUNT - 1), max_size=8), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from(["pinned", "disk"]),
)
def test_any_sequence_of_orders(tmp_path: Path, vgpu: Virtual, orders: list[list[int]], slots: int, tier: str) -> None:
    """Also with more slots than the planner grants."""
    vgpu.reset()
    module = stack(COUNT, 16)
    expected = [reference(module, order, vgpu.device) for order in orders]
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, 1), tier=tier)
    plan = task.plan()
    phase = dataclasses.replace(plan.phases[0], staging_bytes=slots * plan.phases[0].slot_bytes)
    engine = task.engine(tmp_path, dataclasses.replace(plan, phases=(phase,), fingerprint="")).attach(task.modules, None)
    try:
        for order, right in zip(orders, expected, strict=True):
            module.order = order
            assert same(call(module, rows()), right)
    finally:
        engine.detach()


@contextlib.contextmanager
def homes(module: Stack, slots: int, tiers: list[Tier], vgpu: Virtual, folder: Path) -> Iterator[tuple[Engine, threading.Event]]:
    """A stack with a home per block, and an event without which nothing is read."""
    task = job(module, vgpu.device, budget_bytes=slots_budget(module, slots), tier="disk")
    plan = task.plan()
    placements = tuple(dataclasses.replace(p, tier=tier, home=tier) for p, tier in zip(plan.phases[0].placements, tiers, strict=True))
    phase = dataclasses.replace(plan.phases[0], placements=placements)
    engine, gate = task.engine(folder, dataclasses.replace(plan, phases=(phase,), fingerprint="")), threading.Event()
    gate.set()
    read = engine._reader.read

    def gated(*args: object) -> None:
        assert gate.wait(TIMEOUT_S)
        read(*args)

    engine._reader.read = gated
    engine.attach(task.modules, None)
    try:
        settled(engine)
        yield engine, gate
    finally:
        gate.set()
        engine.detach()


def test_a_copy_from_ram_waits_for_a_read_under_way_into_its_slot(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(3, 16)
    expected = [on_device(b, rows()) for b in module.blocks]
    with homes(module, 1, [Tier.PINNED, Tier.DISK, Tier.PINNED], vgpu, tmp_path) as (_, gate):
        gate.clear()
        assert same(call(module.blocks[0], rows()), expected[0])  # and asks for block 1
        opens = threading.Timer(0.05, gate.set)
        opens.start()
        assert same(call(module.blocks[2], rows()), expected[2])
        opens.join()
        time.sleep(0.05)
        for k in (0, 1):
            assert same(call(module.blocks[k], rows()), expected[k])


def test_nothing_is_prefetched_into_a_slot_that_a_read_is_under_way_to(tmp_path: Path, vgpu: Virtual) -> None:
    """The copy from RAM would be overtaken by the read that was asked for before it."""
    module = stack(4, 16)
    expected = [on_device(b, rows()) for b in module.blocks]
    with homes(module, 2, [Tier.PINNED, Tier.PINNED, Tier.PINNED, Tier.DISK], vgpu, tmp_path) as (engine, gate):
        successor = engine._phases[0].streamer._successor
        gate.clear()
        for foreseen in (3, 1):
            successor[0] = foreseen
            assert same(call(module.blocks[0], rows()), expected[0])
        gate.set()
        settled(engine)
        time.sleep(0.05)
        for k in (1, 3, 1):
            assert same(call(module.blocks[k], rows()), expected[k])


def test_blocks_called_by_themselves_are_right(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(COUNT, 16)
    expected = [on_device(b, rows()) if not device.on_host else b(rows()) for b in module.blocks]
    with job(module, device, tier=tier).attached(tmp_path):
        for k in (4, 1, 1, 5, 0):
            assert same(run(module.blocks[k], device), expected[k])


# ---- threads


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("slots", [1, 2])
def test_threads_share_a_model(
    threads: int, slots: int, place: tuple[Device, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who leaves a slot tells those that wait for it; looking after the dead is not what makes them go on.
    monkeypatch.setattr(streamer, "_LOOK_AGAIN_S", 2 * TIMEOUT_S)
    device, tier = place
    module = stack(COUNT, 16, ends=True)
    inputs = [rows(seed=i) for i in range(threads)]
    expected = [on_device(module, x) if not device.on_host else module(x) for x in inputs]
    with job(module, device, budget_bytes=slots_budget(module, slots), tier=tier).attached(tmp_path):

        def work(index: int) -> None:
            for _ in range(4):
                assert same(run(module, device, inputs[index]), expected[index])

        in_threads(threads, work)
        assert same(run(module, device, inputs[0]), expected[0])


def test_threads_that_fail_leave_the_others_alone(place: tuple[Device, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamer, "_LOOK_AGAIN_S", 2 * TIMEOUT_S)
    device, tier = place
    module = stack(COUNT, 16, ends=True)
    expected = run_plain(module, device)
    victim = threading.local()

    def sometimes(*_: object) -> None:
        if getattr(victim, "fails", False):
            raise ValueError("mine alone")

    module.blocks[2].up.register_forward_pre_hook(sometimes)
    with job(module, device, tier=tier).attached(tmp_path):

        def work(index: int) -> None:
            victim.fails = index == 0
            for _ in range(5):
                if index == 0:
                    with pytest.raises(ValueError, match="mine alone"):
                        run(module, device)
                else:
                    assert same(run(module, device), expected)

        in_threads(3, work)


def run_plain(module: nn.Module, device: Device) -> torch.Tensor:
    return module(rows()) if device.on_host else on_device(module, rows())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_inside_a_block_does_not_block_the_others(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(COUNT, 16)
    expected = run_plain(module, device)
    with job(module, device, budget_bytes=slots_budget(module, 1), tier=tier).attached(tmp_path):
        module.blocks[2].fault = SystemExit()
        thread = threading.Thread(target=lambda: run(module, device), daemon=True)
        thread.start()
        thread.join(TIMEOUT_S)
        module.blocks[2].fault = None

        def work(_: int) -> None:
            assert same(run(module, device), expected)

        in_threads(1, work)


# ---- errors in the middle


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("slots", [1, 2])
def test_after_an_error_in_any_block_the_next_call_is_right(
    kind: type[BaseException], slots: int, place: tuple[Device, str], tmp_path: Path
) -> None:
    device, tier = place
    module = stack(COUNT, 16, ends=True)
    expected, before = run_plain(module, device), snapshot(module)
    with job(module, device, budget_bytes=slots_budget(module, slots), tier=tier).attached(tmp_path):
        for k in range(COUNT):
            # Made here: an exception keeps the frames, and the tensors in them, that it went through.
            module.blocks[k].fault = kind("in the middle")
            with pytest.raises(kind):
                run(module, device)
            module.blocks[k].fault = None
            assert same(run(module, device), expected), k
    assert snapshot(module) == before


@pytest.mark.parametrize("slots", [1, 2])
def test_after_an_interrupt_single_blocks_may_be_called_too(slots: int, place: tuple[Device, str], tmp_path: Path) -> None:
    """``vae.decode`` and ``model.model(...)`` do not go through the call of the component itself."""
    device, tier = place
    module = stack(COUNT, 16)
    expected = [on_device(b, rows()) if not device.on_host else b(rows()) for b in module.blocks]
    with job(module, device, budget_bytes=slots_budget(module, slots), tier=tier).attached(tmp_path):
        for k, then in itertools.product(range(3), range(COUNT)):
            module.blocks[k].fault = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                run(module.blocks[k], device)
            module.blocks[k].fault = None
            for j in (then, k, then):
                assert same(run(module.blocks[j], device), expected[j]), (k, then)


def test_an_interrupt_leaves_the_weights_readable(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(COUNT, 16)
    truth = {n: t.clone() for n, t in module.state_dict().items()}
    engine = job(module, vgpu.device).attach(tmp_path)
    module.blocks[3].fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        call(module, rows())
    module.blocks[3].fault = None
    engine.detach()
    gc.collect()  # the exception's frames
    assert all(same(t, truth[n]) for n, t in module.state_dict().items())
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_a_block_inside_a_block_that_shares_its_slot_is_refused_and_the_next_call_is_right(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(COUNT, 16)
    expected = on_device(module, rows())
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 1)).attached(tmp_path):
        nested = module.blocks[0].up.register_forward_pre_hook(lambda m, args: (module.blocks[2](args[0]),))
        with pytest.raises(Unsupported, match=r"blocks\.2 is called inside blocks\.0"):
            call(module, rows())
        nested.remove()
        assert same(call(module, rows()), expected)


@pytest.mark.parametrize("inner", [1, 2, 5])
def test_a_block_inside_a_block_takes_another_slot_and_is_right(inner: int, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(COUNT, 16)
    module.blocks[0].up.register_forward_pre_hook(lambda m, args: (module.blocks[inner](args[0]),))
    expected = on_device_nested(inner)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attached(tmp_path):
        for _ in range(3):
            assert same(call(module, rows()), expected)


def on_device_nested(inner: int) -> torch.Tensor:
    plain = stack(COUNT, 16).to("vgpu")
    plain.blocks[0].up.register_forward_pre_hook(lambda m, args: (plain.blocks[inner](args[0]),))
    return call(plain, rows())


# ---- gradients


def test_gradients_are_refused_for_the_model_and_for_single_blocks(place: tuple[Device, str], tmp_path: Path) -> None:
    device, tier = place
    module = stack(COUNT, 16, ends=True).requires_grad_(True)
    expected = run_plain(module, device).detach()
    with job(module, device, tier=tier).attached(tmp_path):
        x = rows().to(device.torch_device).requires_grad_(True)
        for target in (module, module.blocks[1]):
            with pytest.raises(Unsupported, match=r"overflowml\.release"):
                target(x)
        # Without gradients asked for, grad mode itself is no obstacle, and nothing is recorded.
        out = module(rows().to(device.torch_device))
        assert not out.requires_grad
        assert same(out.cpu(), expected)
        with torch.no_grad():
            assert same(module(x).cpu(), expected)
    assert all(p.requires_grad for p in module.parameters())
