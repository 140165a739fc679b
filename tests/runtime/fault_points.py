"""Fails the k-th call of a kind in one stage of a managed model's life, and holds what follows against what is promised."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import OverflowmlError, ReadFault
from overflowml_core.runtime.device import StreamDevice
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.open_file import OpenFile
from tests.runtime.build import TIMEOUT_S, job, on_meta, same, snapshot
from tests.runtime.conftest import Virtual
from tests.vdevice import Faults

KINDS = ("alloc", "copy", "pin", "read", "thread", "event")
STAGES = ("load", "first pass", "later pass", "switch", "remove")
MOST_POINTS = 5000


@dataclass
class Tally:
    """What a sweep met.

    Attributes:
        points: calls that were made to fail.
        right: of them, those after which the result was right all the same.
        clear: those that ended in an error that says what failed.
        wrong: everything else, in words.
    """

    points: int = 0
    right: int = 0
    clear: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """A model and a call of it.

    Attributes:
        module: on the CPU.
        path: a file with its weights, for which they are left unread; None where they are live.
        call: runs it with inputs on the device and gives a tensor on the CPU.
        budget_bytes: of the device.
        tier: where streamed weights wait.
    """

    module: nn.Module
    path: Path | None
    call: Callable[[nn.Module], torch.Tensor]
    budget_bytes: int
    tier: str

    def twins(self) -> tuple[dict[str, nn.Module], Any]:
        """Two phases, so that there is a switch; the second is live."""
        other = copy.deepcopy(self.module)
        if self.path is None:
            return {"one": copy.deepcopy(self.module), "two": other}, None
        twin, loading = on_meta(self.module, self.path)
        return {"one": twin}, loading


class Injector:
    """Counts calls of one kind and fails one of them."""

    def __init__(self, vgpu: Virtual, kind: str, k: int) -> None:
        self._vgpu, self._kind, self._k = vgpu, kind, k
        self._count = 0
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        """Whether there was a k-th call."""
        return self._vgpu.sim._calls[self._kind] >= self._k if self._kind in ("alloc", "copy", "pin") else self._count >= self._k

    def _is_hit(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count == self._k

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the k-th call from now on fail."""
        if self._kind in ("alloc", "copy", "pin"):
            self._vgpu.sim.faults = Faults(**{self._kind: {self._k}})
            yield
            return
        owner, name = {"read": (OpenFile, "read"), "thread": (threading.Thread, "start"), "event": (StreamDevice, "record")}[self._kind]
        true = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_hit():
                if self._kind == "read":
                    raise ReadFault("model.safetensors", 0, 1, 0, "injected fault")
                raise RuntimeError(f"injected fault: {self._kind}")
            return true(*args, **kwargs)

        setattr(owner, name, call)
        try:
            yield
        finally:
            setattr(owner, name, true)


def sweep(vgpu: Virtual, subject: Subject, kind: str, stage: str, folder: Path, stride: int = 1) -> Tally:
    """Fail every call of a kind in a stage, one after the other, or one in ``stride``."""
    tally = Tally()
    modules, _ = subject.twins()
    on_device = copy.deepcopy(subject.module).to("vgpu")
    expected = subject.call(on_device)
    del modules, on_device
    for k in range(1, MOST_POINTS, stride):
        gc.collect()
        vgpu.sim.faults = Faults()
        before = (vgpu.sim.allocated_bytes, vgpu.sim.pinned_bytes, _own_threads())
        if not _attempt(vgpu, subject, Injector(vgpu, kind, k), stage, expected, folder, tally, f"{kind} {k} in {stage}"):
            break
        _settle(vgpu, before, tally, f"{kind} {k} in {stage}")
    return tally


def _attempt(
    vgpu: Virtual, subject: Subject, injector: Injector, stage: str, expected: torch.Tensor, folder: Path, tally: Tally, name: str
) -> bool:
    modules, loading = subject.twins()
    whole = {part: snapshot(module) for part, module in modules.items()} if loading is None else None
    task = job(modules, vgpu.device, budget_bytes=subject.budget_bytes, tier=subject.tier, loading=loading)
    engines: list[Engine] = []
    first, last = modules["one"], list(modules.values())[-1]
    steps: dict[str, Callable[[], torch.Tensor | None]] = {
        "load": lambda: engines.append(task.attach(folder)),
        "first pass": lambda: subject.call(first),
        "later pass": lambda: subject.call(first),
        "switch": lambda: subject.call(last),
        "remove": lambda: engines[0].detach(),
    }
    problem: BaseException | None = None
    for step, work in steps.items():
        if step != stage:
            _check(work(), expected, tally, f"{name}, {step} after it" if problem else f"{name}, {step} before it")
            continue
        try:
            with injector.at_work():
                result = work()
        except (RuntimeError, OverflowmlError) as error:
            problem = error.with_traceback(None)
            if "injected fault" not in str(error):
                tally.wrong.append(f"{name}: {error!r}")
            result = None
        vgpu.sim.faults, has_failed = Faults(), injector.has_failed
        if not has_failed:
            if engines:
                engines[0].detach()
            return False
        tally.points += 1
        tally.clear += problem is not None
        tally.right += problem is None
        if problem is None:
            _check(result, expected, tally, name)
            if step != "remove":
                # A copy that was sent for ahead may have failed: the call that needs it says so.
                with contextlib.suppress(RuntimeError, ReadFault):
                    subject.call(first)
        else:
            work()  # the next call works
    if whole is not None and {part: snapshot(module) for part, module in modules.items()} != whole:
        tally.wrong.append(f"{name}: the weights are not as they were")
    return True


def _check(result: torch.Tensor | None, expected: torch.Tensor, tally: Tally, name: str) -> None:
    if result is not None and not same(result, expected):
        tally.wrong.append(f"{name}: another result")


def _own_threads() -> frozenset[threading.Thread]:
    return frozenset(thread for thread in threading.enumerate() if thread.name.startswith("overflowml"))


def _settle(vgpu: Virtual, before: tuple[int, int, frozenset[threading.Thread]], tally: Tally, name: str) -> None:
    allocated_bytes, pinned_bytes, threads = before
    gc.collect()
    for thread in _own_threads() - threads:
        thread.join(TIMEOUT_S)
    gc.collect()
    if (vgpu.sim.allocated_bytes, vgpu.sim.pinned_bytes) != (allocated_bytes, pinned_bytes):
        found = vgpu.sim.allocated_bytes, vgpu.sim.pinned_bytes
        tally.wrong.append(f"{name}: (device, pinned) bytes were {(allocated_bytes, pinned_bytes)} and are {found}")
    left = _own_threads() - threads
    if left:
        tally.wrong.append(f"{name}: threads are left: {sorted(thread.name for thread in left)}")
