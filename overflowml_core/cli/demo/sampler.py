"""Memory of this process and of its accelerator over time. Knows nothing of what runs meanwhile."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import psutil

_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of this process.

    Attributes:
        anonymous_bytes: what belongs to the process alone: heaps, stacks, private copies.
        mapped_bytes: pages of files that it has mapped, such as weights; the system takes them back when it needs them.
            0 where the platform does not tell them apart.
    """

    anonymous_bytes: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment, as growth above the baseline.

    Attributes:
        second: since the sampler started.
        anonymous_bytes: of the process.
        mapped_bytes: of the process.
        device_bytes: of the accelerator's allocator; 0 without an accelerator.
        engine_bytes: the most that overflowml's engine held until now; 0 in a plain run.
    """

    second: float
    anonymous_bytes: int
    mapped_bytes: int
    device_bytes: int
    engine_bytes: int


def process_memory() -> Memory:
    """Resident memory of this process now."""
    if sys.platform == "linux":
        with open("/proc/self/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file)
        return Memory(_kib(fields, b"RssAnon"), _kib(fields, b"RssFile"))
    process = psutil.Process()
    if sys.platform == "win32":
        return Memory(int(process.memory_info().private), 0)
    return Memory(int(process.memory_full_info().uss), 0)


def _kib(fields: dict[bytes, bytes], name: bytes) -> int:
    return int(fields.get(name, b"0 kB").split()[0]) * 1024


def settle() -> None:
    """Give back what can be given back, so that the next reading shows what is really held."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class Sampler:
    """Reads memory every 10 ms in a thread of its own, from ``with`` to its end.

    Args:
        device_bytes: reads the accelerator's allocator, None without an accelerator.
    """

    def __init__(self, device_bytes: Callable[[], int] | None = None) -> None:
        self._device_bytes = device_bytes
        self._engine_bytes: Callable[[], int] | None = None
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="overflowml-demo-sampler", daemon=True)
        settle()
        self._baseline = process_memory()
        self._device_baseline = device_bytes() if device_bytes else 0
        self._start = time.perf_counter()

    def __enter__(self) -> Sampler:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._samples.append(self._read())

    def watch(self, engine_bytes: Callable[[], int]) -> None:
        """From now on also read what the engine holds, in bytes."""
        self._engine_bytes = engine_bytes

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What was read, in order of time."""
        return tuple(self._samples)

    def _loop(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._samples.append(self._read())

    def _read(self) -> Sample:
        memory = process_memory()
        return Sample(
            second=round(time.perf_counter() - self._start, 4),
            anonymous_bytes=memory.anonymous_bytes - self._baseline.anonymous_bytes,
            mapped_bytes=memory.mapped_bytes - self._baseline.mapped_bytes,
            device_bytes=self._device_bytes() - self._device_baseline if self._device_bytes else 0,
            engine_bytes=self._engine_bytes() if self._engine_bytes else 0,
        )
