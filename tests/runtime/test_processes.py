"""Processes beside a managed model: forked ones are refused it and harm nobody, spawned ones manage their own, loaders go on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import TIMEOUT_S, job, on_meta, rows, same, save, slots_budget, stack
from tests.runtime.test_turns import ended, gated, started

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def in_fork(work: Callable[[], object]) -> object:
    """What work gives or raises in a forked child; a child that hangs is killed, and that is a failure."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                said: object = work()
            except BaseException as error:  # noqa: BLE001 -- told to the parent
                said = f"{type(error).__name__}: {error}"
            os.write(writes, pickle.dumps(said))
        except BaseException:  # noqa: BLE001 -- a child of pytest must not go on as pytest
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writes)
    try:
        if not select.select([reads], [], [], TIMEOUT_S)[0]:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the forked child hangs")
        return pickle.loads(os.read(reads, 2**16))
    finally:
        os.close(reads)
        os.waitpid(child, 0)


def unread(folder: Path, count: int = 4) -> tuple[nn.Module, Engine, torch.Tensor]:
    """A stack whose blocks are streamed from its file, and what it gives where nobody manages it."""
    plain = stack(count, 16, ends=True)
    file = folder / "model.safetensors"
    twin, loading = on_meta(plain, file if file.exists() else save(dict(plain.named_parameters()), file))
    task = job(twin, HostDevice(), budget_bytes=slots_budget(plain, 2), tier="disk", loading=loading)
    return twin, task.attach(folder / "store"), plain(rows())


@forks
@pytest.mark.parametrize("had_a_pass", [False, True])
def test_a_forked_child_is_told_and_its_parent_goes_on(had_a_pass: bool, tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    if had_a_pass:
        assert same(module(rows()), expected)
    for use in (lambda: module(rows()), lambda: module.blocks[2](rows()), engine.detach, lambda: engine.rearrange(engine.plan)):
        said = str(in_fork(use))
        assert said.startswith("Unsupported: process ")
        assert "was forked while overflowml managed this model" in said
        assert "'spawn'" in said
    assert same(module(rows()), expected)
    engine.detach()
    assert same(module(rows()), expected)


@forks
def test_a_forked_child_has_a_model_that_was_given_back(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    engine.detach()
    found = in_fork(lambda: (engine.detach(), module(rows()).tolist())[1])
    assert found == expected.tolist()


@forks
def test_a_forked_child_manages_a_model_of_its_own(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    module(rows())

    def own() -> list[list[float]]:
        twin, own_engine, _ = unread(tmp_path)
        found = twin(rows()).tolist()
        own_engine.detach()
        return found  # type: ignore[no-any-return]

    assert in_fork(own) == expected.tolist()
    assert same(module(rows()), expected)
    engine.detach()


@forks
def test_a_fork_in_the_middle_of_a_pass_of_another_thread_does_not_hang(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    gate = gated(module)
    inside, results = started(lambda: module(rows()))
    assert gate.reached.wait(TIMEOUT_S)
    for use in (lambda: module(rows()), engine.detach):
        assert "was forked" in str(in_fork(use))
    gate.open.set()
    ended(inside)
    assert same(results[0], expected)  # type: ignore[arg-type]
    engine.detach()


@forks
def test_locks_that_other_threads_hold_at_a_fork_do_not_hang_the_child(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    module(rows())
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._switch, engine._phases[0].streamer._lock:
            is_held.set()
            may_go.wait(TIMEOUT_S)

    holder, _ = started(hold)
    assert is_held.wait(TIMEOUT_S)
    try:
        for use in (lambda: module(rows()), lambda: module.blocks[1](rows()), engine.detach, lambda: engine.recast("model", torch.float64)):
            assert "was forked" in str(in_fork(use))
    finally:
        may_go.set()
    ended(holder)
    assert same(module(rows()), expected)
    engine.detach()


@forks
def test_who_forks_inside_a_pass_goes_on_in_the_parent_and_is_refused_in_the_child(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    heard: list[str] = []
    parent = os.getpid()
    reads, writes = os.pipe()

    def fork(*_: object) -> None:
        if os.getpid() == parent and not heard:
            heard.append("forked")
            heard.append(str(os.fork()))

    hook = module.blocks[1].register_forward_hook(fork)
    try:
        result: object = module(rows())
    except BaseException as error:  # noqa: BLE001 -- told to the parent
        result = f"{type(error).__name__}: {error}"
    if os.getpid() != parent:
        os.write(writes, str(result).encode())
        os._exit(0)
    hook.remove()
    try:
        assert select.select([reads], [], [], TIMEOUT_S)[0], "the forked child hangs"
        assert "was forked" in os.read(reads, 2**16).decode()
    finally:
        os.kill(int(heard[1]), signal.SIGKILL)
        os.waitpid(int(heard[1]), 0)
        os.close(reads)
        os.close(writes)
    assert same(result, expected)  # type: ignore[arg-type]
    assert same(module(rows()), expected)
    engine.detach()


def _spawned(folder: Path, results: multiprocessing.SimpleQueue[object]) -> None:
    module, engine, expected = unread(folder)
    found = [same(module(rows()), expected) for _ in range(2)]
    engine.detach()
    results.put((*found, same(module(rows()), expected)))


def test_a_spawned_worker_manages_its_own_with_the_same_store(tmp_path: Path) -> None:
    module, engine, expected = unread(tmp_path)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=_spawned, args=(tmp_path, results), daemon=True)
    worker.start()
    deadline = time.monotonic() + TIMEOUT_S
    while worker.is_alive() and time.monotonic() < deadline:
        assert same(module(rows()), expected)
        time.sleep(0.01)
    worker.join(1)
    assert worker.exitcode == 0
    assert results.get() == (True, True, True)
    assert same(module(rows()), expected)
    engine.detach()


class Rows(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return rows(seed=index)[0]


@forks
def test_a_data_loader_with_forked_workers_feeds_a_managed_model(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    module, engine, _ = unread(tmp_path)
    plain = stack(4, 16, ends=True)
    module(rows())
    loader = DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT_S)
    count = 0
    for batch in loader:
        assert same(module(batch), plain(batch))
        count += 1
    assert count == 3
    engine.detach()
    assert not any(thread.name.startswith("overflowml") for thread in set(threading.enumerate()) - before)
