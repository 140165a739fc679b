"""MemoryGuard: cleans where memory is over the threshold, and never stands in the way of an error."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import overflowml
from overflowml_core import guard as guard_module
from overflowml_core.errors import BadLimits, BadSize, Unsupported
from overflowml_core.guard import MemoryGuard, OverCeiling
from overflowml_core.reading import Reading

ROOT = Path(__file__).parents[2]


class Memory:
    """RAM as a test wants it; collecting garbage frees what it says."""

    def __init__(self, monkeypatch, used: int, held: int = 40, garbage: int = 0) -> None:
        self.used, self.held, self.garbage, self.collections = used, held, garbage, 0
        monkeypatch.setattr(guard_module, "_devices", lambda: ())
        monkeypatch.setattr(guard_module, "_ram", lambda: Reading("ram", 100, 100 - self.used, self.held))
        monkeypatch.setattr(guard_module.gc, "collect", self.collect)

    def collect(self) -> None:
        self.collections += 1
        self.used, self.held, self.garbage = self.used - self.garbage, self.held - self.garbage, 0


def test_nothing_is_cleaned_below_the_threshold(monkeypatch):
    memory = Memory(monkeypatch, used=70)
    with MemoryGuard(0.7) as guard:
        pass
    assert (memory.collections, guard.cleanings, guard.last) == (0, 0, None)


def test_over_the_threshold_garbage_goes_and_is_reported(monkeypatch):
    memory = Memory(monkeypatch, used=60)
    guard = MemoryGuard(0.7)
    with guard:
        memory.used, memory.held, memory.garbage = 85, 65, 20
    assert guard.last is not None
    assert (guard.last.freed_bytes, guard.last.crowded) == ({"ram": 20}, ("ram",))
    assert (guard.cleanings, guard.freed_host_bytes, guard.freed_device_bytes) == (1, 20, 0)


def test_what_cannot_be_freed_is_not_looked_for_in_every_iteration(monkeypatch):
    memory = Memory(monkeypatch, used=80)
    guard = MemoryGuard(0.7)
    for _ in range(5):
        with guard:
            pass
    assert memory.collections == 1
    memory.used = 82
    with guard:
        pass
    assert memory.collections == 2
    memory.used = 60
    with guard:
        pass
    memory.used = 81
    with guard:
        pass
    assert memory.collections == 3, "after it was below, the threshold counts again"


def test_a_ceiling_is_an_error_only_where_cleaning_does_not_help(monkeypatch):
    memory = Memory(monkeypatch, used=10, held=2**21 + 5, garbage=10)
    guard = MemoryGuard(host_memory=2**21)
    with guard:
        pass
    assert (guard.cleanings, guard.freed_host_bytes) == (1, 10)
    memory.held = 2**21 + 1
    with pytest.raises(OverCeiling, match=r"host_memory=2\.0 MiB: .*; raise the ceiling") as raised, guard:
        pass
    assert isinstance(raised.value, MemoryError)
    assert (raised.value.held_bytes, raised.value.ceiling_bytes) == (2**21 + 1, 2**21)


def test_the_error_of_the_body_is_raised_even_over_the_ceiling(monkeypatch):
    memory = Memory(monkeypatch, used=10, held=0)

    def body() -> None:
        memory.used, memory.held = 90, 2**30
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), MemoryGuard(host_memory=2**20):
        body()
    assert memory.collections == 1


def test_guards_nest_in_themselves_and_in_others(monkeypatch):
    memory = Memory(monkeypatch, used=10)
    outer, inner = MemoryGuard(0.9), MemoryGuard(0.5)
    with outer, outer, inner:
        memory.used, memory.garbage = 60, 5
    assert (outer.cleanings, inner.cleanings) == (0, 1)


def test_as_a_decorator_it_guards_calls_coroutines_and_generators(monkeypatch):
    memory = Memory(monkeypatch, used=10)
    guard = MemoryGuard(0.5)

    @guard
    def call(value: int) -> int:
        """Words."""
        memory.used, memory.garbage = 60, 50
        return value

    @guard
    async def coroutine(value: int) -> int:
        await asyncio.sleep(0)
        return call(value)

    @guard
    def generator(value: int):
        memory.used, memory.garbage = 60, 50
        yield value
        return value

    assert (call(1), call.__doc__, guard.cleanings) == (1, "Words.", 1)
    assert (asyncio.run(coroutine(2)), guard.cleanings) == (2, 2)
    assert (list(generator(3)), guard.cleanings) == ([3], 3)

    async def endless():
        yield 1

    with pytest.raises(Unsupported, match="with guard"):
        guard(endless)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, 70, True, "0.7", None, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(BadLimits, match=r"write 0\.7"):
        MemoryGuard(threshold)


def test_a_ceiling_that_is_no_size_is_refused():
    with pytest.raises(BadSize, match="host_memory"):
        MemoryGuard(host_memory="much")


def test_real_garbage_is_collected_and_real_memory_is_read():
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gc.disable()
    try:
        lost = weakref.ref(Cycle())
        assert lost() is not None
        guard = overflowml.MemoryGuard(threshold=1e-9)
        with guard:
            pass
    finally:
        gc.enable()
    assert lost() is None
    assert guard.last is not None
    assert "ram" in guard.last.freed_bytes


def test_a_guard_at_work_imports_no_torch():
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
    code += "from overflowml_core.guard import MemoryGuard\nwith MemoryGuard(1e-9) as guard: pass\n"
    code += "print(guard.cleanings, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["1", "False"], done.stderr
