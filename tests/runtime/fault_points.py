"""Fails the k-th call of a kind in one stage of a managed model's life, and holds what follows against what is promised."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from overflowml_core.errors import OverflowmlError, ReadFault
from overflowml_core.runtime.device import StreamDevice
from overflowml_core.runtime.open_file import OpenFile
from tests.runtime.build import TIMEOUT_S, same
from tests.runtime.conftest import Virtual
from tests.runtime.interrupts import Interrupter
from tests.vdevice import Faults

KINDS = ("alloc", "copy", "pin", "read", "thread", "event")
"""Of calls that fail."""
INTERRUPT = "interrupt"
"""The kind of a KeyboardInterrupt, which may fall anywhere in the calling thread."""
MOST_POINTS = 100_000
INJECTED = "injected fault"
"""What every error that is injected says, and every error that it leads to has to pass on."""


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


class Life(Protocol):
    """One model from before its load to after its release."""

    @property
    def steps(self) -> Mapping[str, Callable[[], torch.Tensor | None]]:
        """By stage what is done in it, in order; the last one ends the life. Passes give a tensor on the CPU."""

    def recover(self, stage: str) -> None:
        """What the user of a host has to take back after an error in a stage, before the same can be asked for again."""

    def remainder(self) -> str:
        """After the last step: what is not as it was before, empty where all is."""


class Subject(Protocol):
    """Something to manage.

    Attributes:
        stages: of its lives.
        expected: results by stage, of a model that nobody manages.
    """

    stages: tuple[str, ...]
    expected: Mapping[str, torch.Tensor]

    def begin(self) -> Life:
        """A new life, of which nothing has happened."""


class Injector:
    """Counts calls of one kind and fails one of them."""

    def __init__(self, vgpu: Virtual, kind: str, k: int) -> None:
        self._vgpu, self._kind, self._k = vgpu, kind, k
        self._count = 0
        self._lock = threading.Lock()
        self.has_failed = False
        """Whether there was a k-th call."""

    def _is_hit(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count == self._k

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the k-th call from now on fail."""
        if self._kind in ("alloc", "copy", "pin"):
            sim = self._vgpu.sim
            sim.faults = Faults(**{self._kind: {self._k}})
            try:
                yield
            finally:
                self.has_failed = sim._calls[self._kind] >= self._k
                sim.faults = Faults()
            return
        owner, name = {"read": (OpenFile, "read"), "thread": (threading.Thread, "start"), "event": (StreamDevice, "record")}[self._kind]
        true = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_hit():
                if self._kind == "read":
                    raise ReadFault("model.safetensors", 0, 1, 0, INJECTED)
                raise RuntimeError(f"{INJECTED}: {self._kind}")
            return true(*args, **kwargs)

        setattr(owner, name, call)
        try:
            yield
        finally:
            setattr(owner, name, true)
            self.has_failed = self._count >= self._k


class Sweep:
    """All points of one kind in one stage of a subject's life."""

    def __init__(self, vgpu: Virtual, subject: Subject, kind: str, stage: str) -> None:
        self.tally = Tally()
        self._vgpu, self._subject, self._kind, self._stage = vgpu, subject, kind, stage
        self._most_bytes = 0
        """On the device after any stage where nothing failed."""
        self._name = ""

    def run(self, stride: int = 1) -> Tally:
        """Fail every call, one after the other, or one in ``stride``."""
        self._live_undisturbed()
        for k in range(1, MOST_POINTS, stride):
            before = self._level()
            self._name = f"{self._kind} {k} in {self._stage}"
            if not self._attempt(Interrupter(k) if self._kind == INTERRUPT else Injector(self._vgpu, self._kind, k)):
                return self.tally
            self._settle(before)
        self._note(f"there are more than {MOST_POINTS} points")
        return self.tally

    def _live_undisturbed(self) -> None:
        before, life = self._level(), self._subject.begin()
        for stage, work in life.steps.items():
            self._name = f"nothing failed, {stage}"
            self._check(work(), stage)
            self._most_bytes = max(self._most_bytes, self._level()[0] - before[0])
        self._note(life.remainder())

    def _attempt(self, injector: Injector | Interrupter) -> bool:
        base_bytes, life = self._level()[0], self._subject.begin()
        for stage in self._needed():
            work = life.steps[stage]
            if stage != self._stage:
                self._check(work(), stage)
                continue
            problem, result = self._fail(work, injector)
            if not injector.has_failed:
                break
            self.tally.points += 1
            if problem:
                self.tally.clear += 1
                life.recover(stage)
                self._check(work(), stage)
            else:
                self.tally.right += 1
                self._check(result, stage)
                if stage != self._subject.stages[-1]:
                    # A copy that was sent for ahead may have failed: the call that needs it says so.
                    self._fail(life.steps[self._subject.stages[1]])
            self._compare_level(base_bytes)
        else:
            self._note(life.remainder())
            return True
        if self._stage != self._subject.stages[-1]:
            life.steps[self._subject.stages[-1]]()
        return False

    def _needed(self) -> list[str]:
        """The stages of a life in which one fails: the ends, those around it, and itself."""
        stages = self._subject.stages
        at = stages.index(self._stage)
        return [stage for k, stage in enumerate(stages) if k in (0, at - 1, at, at + 1, len(stages) - 1)]

    def _fail(
        self, work: Callable[[], torch.Tensor | None], injector: Injector | Interrupter | None = None
    ) -> tuple[str, torch.Tensor | None]:
        """What an attempt says of its failure, and what it gives; no frame of it is kept alive."""
        try:
            with contextlib.nullcontext() if injector is None else injector.at_work():
                return "", work()
        except (RuntimeError, OverflowmlError, KeyboardInterrupt) as error:
            if INJECTED not in str(error):
                self._note(repr(error))
            return str(error), None

    def _check(self, result: torch.Tensor | None, stage: str) -> None:
        if result is not None and not same(result, self._subject.expected[stage]):
            self._note(f"another result in {stage}")

    def _note(self, what: str) -> None:
        if what:
            self.tally.wrong.append(f"{self._name}: {what}")

    def _compare_level(self, base_bytes: int) -> None:
        found_bytes = self._level()[0] - base_bytes
        if found_bytes > self._most_bytes:
            self._note(f"{found_bytes} bytes are on the device while it is managed, at most {self._most_bytes} where nothing failed")

    def _level(self) -> tuple[int, int, frozenset[threading.Thread]]:
        gc.collect()
        return self._vgpu.sim.allocated_bytes, self._vgpu.sim.pinned_bytes, _own_threads()

    def _settle(self, before: tuple[int, int, frozenset[threading.Thread]]) -> None:
        gc.collect()  # readers end when nobody holds them any more
        for thread in _own_threads() - before[2]:
            thread.join(TIMEOUT_S)
        allocated_bytes, pinned_bytes, threads = self._level()
        if (allocated_bytes, pinned_bytes) != before[:2]:
            self._note(f"(device, pinned) bytes were {before[:2]} and are {(allocated_bytes, pinned_bytes)}")
        if left := threads - before[2]:
            self._note(f"threads are left: {sorted(thread.name for thread in left)}")


def sweep(vgpu: Virtual, subject: Subject, kind: str, stage: str, stride: int = 1) -> Tally:
    """Fail every call of a kind in a stage of a subject's life, or one in ``stride``."""
    return Sweep(vgpu, subject, kind, stage).run(stride)


def _own_threads() -> frozenset[threading.Thread]:
    return frozenset(thread for thread in threading.enumerate() if thread.name.startswith("overflowml"))
