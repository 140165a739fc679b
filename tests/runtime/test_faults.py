"""Everything that may fail, at every place where it may: nothing leaks, the error says what it is, and the next attempt works."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import ReadFault
from overflowml_core.runtime.homes import Home
from tests.runtime.build import TIMEOUT_S, Job, Stack, job, on_meta, rows, same, save, settled, slots_budget, snapshot, stack, twice
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device
from tests.vdevice import Faults

TIERS = ["pinned", "ram", "disk"]


def unread(module: nn.Module, folder: Path) -> tuple[nn.Module, object, Path]:
    path = save(dict(module.named_parameters()), folder / "model.safetensors")
    return (*on_meta(module, path), path)


def task_for(module: Stack, vgpu: Virtual, tier: str, **options: object) -> Job:
    return job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1), tier=tier, **options)


def nothing_is_left(vgpu: Virtual, module: nn.Module) -> None:
    gc.collect()
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("kind", ["alloc", "copy"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("phases", [1, 2])
def test_an_attachment_that_fails_anywhere_leaves_the_model_as_it_was(
    kind: str, tier: str, phases: int, tmp_path: Path, vgpu: Virtual
) -> None:
    modules = {f"part{i}": stack(4, 16, seed=i, ends=True) for i in range(phases)}
    modules["part0"].register_buffer("extra", torch.ones(3))
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    task = job(modules, vgpu.device, tier=tier)
    failures = 0
    for k in range(1, 100):
        vgpu.sim.faults = Faults(**{kind: {k}})
        engine, problem = None, ""
        try:
            engine = task.attach(tmp_path)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            problem = str(error)
        if engine is None:
            failures += 1
            assert "injected fault" in problem
            for name, module in modules.items():
                assert snapshot(module) == before[name], k
                nothing_is_left(vgpu, module)
            continue
        # From here on the fault hits the streamer's prefetch, whose error waits for the block, or nothing at all.
        vgpu.sim.faults = Faults()
        for name, module in modules.items():
            with contextlib.suppress(RuntimeError):
                assert same(call(module, rows()), expected[name])
            assert same(call(module, rows()), expected[name])
        engine.detach()
        break
    assert failures >= 2
    assert {name: snapshot(m) for name, m in modules.items()} == before


@pytest.mark.parametrize("tier", TIERS)
def test_a_switch_that_fails_anywhere_is_repeated_by_the_next_call(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    modules = {f"part{i}": stack(4, 16, seed=i, ends=True) for i in range(2)}
    modules["part1"].register_buffer("extra", torch.ones(3))
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    x, failures = rows().to("vgpu"), 0
    with torch.no_grad(), job(modules, vgpu.device, tier=tier).attached(tmp_path) as engine:
        for k in range(1, 12):
            modules["part0"](x)
            vgpu.sim.faults = Faults(alloc={k})
            try:
                modules["part1"](x)
            except torch.OutOfMemoryError:
                failures += 1
            vgpu.sim.faults = Faults()
            if failures < k:
                break
            gc.collect()
            if engine._turns.present is None:
                assert vgpu.taken_bytes <= 512  # x: no phase is half there
            for name in ("part1", "part0"):
                assert same(modules[name](x).cpu(), expected[name]), k
    assert failures >= 4
    del x
    assert {name: snapshot(m) for name, m in modules.items()} == before


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("slots", [1, 2])
def test_any_copy_of_a_pass_may_fail_and_the_next_call_is_right(tier: str, slots: int, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(5, 16)
    expected = on_device(module, rows())
    x = rows().to("vgpu")
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=slots_budget(module, slots), tier=tier).attached(tmp_path):
        module(x)
        for k in range(1, 6):
            vgpu.sim.faults = Faults(copy={k})
            with pytest.raises(RuntimeError, match="injected fault"):
                twice(lambda: module(x))  # what fails in the prefetch for the next pass shows there
            vgpu.sim.faults = Faults()
            assert same(module(x).cpu(), expected), k
            assert same(module(x).cpu(), expected), k


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_refused_pinning_falls_back_to_pageable_memory_with_a_warning(
    tier: str, tmp_path: Path, vgpu: Virtual, caplog: pytest.LogCaptureFixture
) -> None:
    module = stack(5, 16)
    expected = on_device(module, rows())
    for k in range(1, 4):
        caplog.clear()
        vgpu.sim.faults = Faults(pin={k})
        with caplog.at_level(logging.WARNING, "overflowml"), task_for(module, vgpu, tier).attached(tmp_path) as engine:
            for _ in range(3):
                assert same(call(module, rows()), expected)
            refused = [r.message for r in caplog.records if "pinning" in r.message and "refused" in r.message]
            assert len(refused) == (1 if tier == "pinned" or k <= 2 else 0)
            assert (engine.device.pageable.held_bytes > 0) == bool(refused)
            assert engine.report().pinned_bytes == engine.device.pinned.peak_bytes
    vgpu.sim.faults = Faults()
    nothing_is_left(vgpu, module)


def test_when_nothing_can_be_pinned_everything_still_works(tmp_path: Path, vgpu: Virtual, caplog: pytest.LogCaptureFixture) -> None:
    module = stack(5, 16)
    expected = on_device(module, rows())
    vgpu.reset(pinned_bytes=0)
    for tier in ("pinned", "disk"):
        with task_for(module, vgpu, tier).attached(tmp_path):
            assert same(call(module, rows()), expected)
            assert vgpu.pinned_bytes == 0


# ---- files


def test_a_file_that_is_cut_while_blocks_stream_from_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64)
    expected = on_device(module, rows(64))
    twin, loading, path = unread(module, tmp_path)
    content, times = path.read_bytes(), path.stat()
    with job(twin, vgpu.device, tier="disk", loading=loading).attached(tmp_path):
        assert same(call(twin, rows(64)), expected)
        for lost in (1, 2, 5):
            os.truncate(path, len(content) - lost * 64 * 64 * 4)
            with pytest.raises(ReadFault) as caught:
                twice(lambda: call(twin, rows(64)))
            assert caught.value.path == path
            assert caught.value.got_bytes < caught.value.expected_bytes in (64 * 64 * 4, len(content))  # a block, or a file that changed
            with path.open("r+b") as file:
                file.write(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            for _ in range(3):
                assert same(call(twin, rows(64)), expected), lost


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64)
    expected = on_device(module, rows(64))
    twin, loading, path = unread(module, tmp_path)
    with job(twin, vgpu.device, tier="disk", loading=loading).attached(tmp_path):
        other = tmp_path / "other"
        other.write_bytes(b"something else")
        os.replace(other, path)
        for _ in range(2):
            assert same(call(twin, rows(64)), expected)


def test_detaching_after_a_read_fault_gives_the_model_back(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64)
    twin, loading, path = unread(module, tmp_path)
    content = path.read_bytes()
    engine = job(twin, vgpu.device, tier="disk", loading=loading).attach(tmp_path)
    twice(lambda: call(twin, rows(64)))
    os.truncate(path, len(content) // 2)
    with pytest.raises(ReadFault):
        twice(lambda: call(twin, rows(64)))
    engine.detach()
    engine.detach()
    nothing_is_left(vgpu, twin)
    with path.open("r+b") as file:
        file.write(content)
    assert same(call(twin.to("vgpu"), rows(64)), on_device(module, rows(64)))


def test_a_reader_that_breaks_in_any_way_reports_in_the_callers_thread(
    tmp_path: Path, vgpu: Virtual, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stack(5, 16)
    expected = on_device(module, rows())
    with task_for(module, vgpu, "disk").attached(tmp_path) as engine:
        true = engine._feeder.feed

        def feed(home: Home, *rest: object) -> None:
            if home.slab.unit.name == "blocks.3":
                raise MemoryError("no room in the reader")
            true(home, *rest)

        call(module, rows())
        monkeypatch.setattr(engine._feeder, "feed", feed)
        with pytest.raises(MemoryError, match="no room in the reader"):
            twice(lambda: call(module, rows()))
        monkeypatch.undo()
        for _ in range(2):
            assert same(call(module, rows()), expected)


# ---- out of memory inside a pass


def test_running_out_of_memory_in_a_block_leaves_the_next_call_right(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(5, 16, ends=True)
    expected = on_device(module, rows())
    x = rows().to("vgpu")
    with torch.no_grad(), job(module, vgpu.device).attached(tmp_path):
        for k in range(1, 12):
            vgpu.sim.faults = Faults(alloc={k})
            with pytest.raises(torch.OutOfMemoryError):
                module(x)
            vgpu.sim.faults = Faults()
            assert same(module(x).cpu(), expected), k


# ---- the end


def test_detaching_while_copies_are_under_way_is_safe(tmp_path: Path, vgpu: Virtual) -> None:
    vgpu.reset(h2d_bytes_per_s=1e3)
    for tier in TIERS:
        module = stack(5, 16)
        before = snapshot(module)
        task_for(module, vgpu, tier).attach(tmp_path).detach()
        assert snapshot(module) == before
        nothing_is_left(vgpu, module)


@pytest.mark.parametrize("tier", TIERS)
def test_an_unread_model_is_given_back_in_plain_memory(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(5, 16, ends=True)
    twin, loading, _ = unread(module, tmp_path)
    engine = task_for(twin, vgpu, tier, loading=loading).attach(tmp_path)
    call(twin, rows())
    engine.detach()
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)
    assert not any(p.is_pinned() for p in twin.parameters())
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("phases", [1, 2])
def test_a_managed_model_that_is_forgotten_frees_everything(tier: str, phases: int, tmp_path: Path, vgpu: Virtual) -> None:
    modules: dict[str, Stack] = {f"part{i}": stack(5, 16, ends=True) for i in range(phases)}
    loading = None
    if phases == 1:
        twin, loading, _ = unread(modules["part0"], tmp_path)
        modules["part0"] = twin  # type: ignore[assignment]
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    engine = job(modules, vgpu.device, tier=tier, loading=loading).attach(tmp_path / "store")
    for module in modules.values():
        call(module, rows())
    gone = [weakref.ref(engine), *(weakref.ref(m) for m in modules.values())]
    device = engine.device
    del engine, module, modules, loading
    if phases == 1:
        del twin
    deadline = time.monotonic() + TIMEOUT_S
    while any(ref() for ref in gone) and time.monotonic() < deadline:
        gc.collect()  # the reader thread may be at its last block
        time.sleep(0.01)
    assert [ref() for ref in gone] == [None] * len(gone)
    vgpu.sim.synchronize()  # what was forgotten while it was copied goes once the copy is over
    gc.collect()
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)
    assert device.arenas.held_bytes == device.pinned.held_bytes == device.pageable.held_bytes == 0
    if files:
        assert len(os.listdir("/proc/self/fd")) == files
    if (tmp_path / "store").exists():
        assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_what_a_failed_call_computed_is_gone_with_its_error(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16)
    x = rows().to("vgpu")
    with task_for(module, vgpu, tier).attached(tmp_path) as engine, torch.no_grad():
        module(x)
        settled(engine)
        gc.collect()
        level_bytes, failures = vgpu.taken_bytes, 0
        for k in range(1, 20):
            vgpu.sim.faults = Faults(copy={k})
            for _ in range(2):  # the copy may be one that was sent for ahead
                try:
                    module(x)
                except RuntimeError:
                    failures += 1
                gc.collect()
                assert vgpu.taken_bytes == level_bytes, k
                vgpu.sim.faults = Faults()
        assert failures >= 4


@pytest.mark.parametrize("phases", [1, 2])
def test_a_removal_that_failed_anywhere_is_finished_by_the_next(phases: int, tmp_path: Path, vgpu: Virtual) -> None:
    modules = {f"part{i}": stack(4, 16, seed=i, ends=True) for i in range(phases)}
    for module in modules.values():
        module.register_buffer("extra", torch.ones(3))
        module.register_buffer("other", torch.ones(5))
    before = {name: snapshot(m) for name, m in modules.items()}
    task = job(modules, vgpu.device, budget_bytes=slots_budget(modules["part0"], 2, 2))
    failures = 0
    for k in range(1, 30):
        engine = task.attach(tmp_path)
        call(modules["part0"], rows())
        vgpu.sim.faults = Faults(copy={k})
        try:
            engine.detach()
        except RuntimeError:
            failures += 1
        else:
            break
        finally:
            vgpu.sim.faults = Faults()
        engine.detach()
        assert {name: snapshot(m) for name, m in modules.items()} == before, k
        nothing_is_left(vgpu, modules["part0"])
    assert failures == k - 1 >= 2


def test_a_switch_that_failed_on_the_way_out_is_finished_by_the_next(tmp_path: Path, vgpu: Virtual) -> None:
    modules = {f"part{i}": stack(4, 16, seed=i) for i in range(2)}
    for module in modules.values():
        module.register_buffer("extra", torch.ones(3))
        module.register_buffer("other", torch.ones(5))
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    with job(modules, vgpu.device, budget_bytes=slots_budget(modules["part0"], 2, 1)).attached(tmp_path) as engine:
        for k in range(1, 14):
            call(modules["part0"], rows())
            settled(engine)
            x = rows().to("vgpu")
            vgpu.sim.faults = Faults(copy={k})
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                modules["part1"](x)
            vgpu.sim.faults = Faults()
            for name in ("part0", "part1", "part0", "part1"):
                with contextlib.suppress(RuntimeError):
                    call(modules[name], rows())  # a copy that was sent for ahead may have failed
                assert same(call(modules[name], rows()), expected[name]), (k, name)
            assert modules["part0"].extra.device.type == "cpu"
            assert modules["part1"].extra.device.type == "vgpu"
            del x
    assert {name: snapshot(m) for name, m in modules.items()} == before
    nothing_is_left(vgpu, modules["part0"])
