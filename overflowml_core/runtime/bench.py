"""Times operations like those of models on one device: copies, elementwise work, products, convolutions, attention, launches."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import psutil
import torch
from torch.nn import functional

from overflowml_core.machine import Accelerator, ComputeRate
from overflowml_core.runtime.bench_code import TinyBlock
from overflowml_core.runtime.device import open_device

_log = logging.getLogger("overflowml")

Call: TypeAlias = Callable[[], object]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PROPORTIONS = ((1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (2.0, 0.5, 1.0))
"""Rows, depth and columns of a product, around the side of the cube with as many operations: products of models are of all three kinds."""
_CHANNELS = (128, 256, 64)
_HEADS = ((16, 64), (24, 128), (32, 64))
"""Heads and their width, as in text encoders, in image transformers and in language models."""
_MULTIPLE = 64
_FIRST_FLOP = 2e7
_LARGEST_STEP = 8.0
_MOST_STEPS = 12
_ALLOCATIONS = 3
"""Rates of RAM depend on where the pages happen to lie, so that several sets of buffers are tried."""
_ENOUGH_S = 0.6
_LAUNCHES = 30


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a calibration takes on.

    Attributes:
        run_s: what one timed call is sized for; products of matrices reach their rate when they take some milliseconds.
        repeats: timed calls of one size; their lower quartile counts.
        buffer_bytes: one buffer of copies and of elementwise operations; several of them exceed every cache.
        disk_bytes: size of the file that is read.
        shapes: how many shapes of a product are tried.
    """

    run_s: float
    repeats: int
    buffer_bytes: int
    disk_bytes: int
    shapes: int


FULL = Effort(run_s=0.04, repeats=7, buffer_bytes=256 * 2**20, disk_bytes=2**30, shapes=3)
QUICK = Effort(run_s=0.015, repeats=3, buffer_bytes=64 * 2**20, disk_bytes=256 * 2**20, shapes=1)


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device of several the one that is synchronized and that records events; nothing where a kind has only one."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return module.device(device) if hasattr(module, "device") else nullcontext()


class Bench:
    """Times operations on one device."""

    def __init__(self, accelerator: Accelerator, effort: Effort) -> None:
        self.accelerator = accelerator
        self.effort = effort
        self.on_host = accelerator.kind == "cpu"
        self.device = torch.device(accelerator.torch_name)
        self.module: Any = None if self.on_host else torch.get_device_module(self.device)
        free = psutil.virtual_memory().available if self.on_host else accelerator.free_bytes
        # Three buffers and their temporary results must not crowd out what else lives there.
        self.buffer_bytes = max(2**20, min(effort.buffer_bytes, free // 16))

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.module is not None:
            self.module.synchronize()

    def seconds(self, call: Call) -> float:
        """Seconds of a call that is long enough to wait for; the first call, which prepares kernels, does not count."""
        call()
        times: list[float] = []
        while len(times) < self.effort.repeats and (len(times) < 2 or sum(times) < _ENOUGH_S):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return max(lower_quartile(times), 1e-9)

    def copy_rates(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes a second to the device and back, from pinned and from pageable RAM; on the CPU all four are a copy in RAM."""
        if self.on_host:
            rate = statistics.median(self._copy_rate() for _ in range(_ALLOCATIONS))
            return (rate, rate), (rate, rate)
        inner = torch.zeros(self.buffer_bytes, dtype=torch.uint8, device=self.device)
        pageable = torch.zeros(self.buffer_bytes, dtype=torch.uint8)
        # The runtime's own pinned buffers are what weights will be copied from; where pinning is refused they are pageable.
        pinned = open_device(self.accelerator).host_buffer(self.buffer_bytes, pin=True).zero_()
        return self._both_ways(inner, pinned), self._both_ways(inner, pageable)

    def _copy_rate(self) -> float:
        source, target = (torch.ones(self.buffer_bytes, dtype=torch.uint8) for _ in range(2))
        return self.buffer_bytes / self.seconds(lambda: target.copy_(source))

    def _both_ways(self, inner: torch.Tensor, outer: torch.Tensor) -> tuple[float, float]:
        there = self.seconds(lambda: inner.copy_(outer, non_blocking=True))
        back = self.seconds(lambda: outer.copy_(inner, non_blocking=True))
        return self.buffer_bytes / there, self.buffer_bytes / back

    def memory_rate(self) -> float:
        """Bytes a second that a large addition into a buffer that is already there reads and writes."""
        return statistics.median(self._addition_rate() for _ in range(_ALLOCATIONS))

    def _addition_rate(self) -> float:
        count = self.buffer_bytes // 4
        first, second = (torch.ones(count, dtype=torch.float32, device=self.device) for _ in range(2))
        total = torch.empty_like(first)
        return 3 * 4 * count / self.seconds(lambda: torch.add(first, second, out=total))

    def launch_seconds(self) -> float:
        """What an operation takes in a model's own code when it has next to nothing to compute."""
        block = TinyBlock(self.device)
        inputs = block.inputs()

        def many() -> None:
            for _ in range(_LAUNCHES):
                block(*inputs)

        return self.seconds(many) / _LAUNCHES / block.OPERATIONS

    def compute_rates(self) -> Iterator[ComputeRate]:
        """Operations a second of each kind of work in each dtype; what the device refuses is left out."""
        for name, dtype in _DTYPES.items():
            for kind, make in (("matmul", self._matmul), ("conv", self._convolution), ("attention", self._attention)):
                try:
                    yield ComputeRate(kind, name, self._rate(make, dtype))
                except (RuntimeError, NotImplementedError) as error:
                    _log.info("%s: no %s in %s (%s)", self.device, kind, name, next(iter(str(error).splitlines()), ""))

    def _rate(self, make: Callable[[torch.dtype, float, int], tuple[float, Call]], dtype: torch.dtype) -> float:
        """The median over shapes whose calls take about ``run_s`` each."""
        wanted_flop = self._sized(lambda flop: make(dtype, flop, 0))
        rates = []
        for shape in range(self.effort.shapes):
            flop, call = make(dtype, wanted_flop, shape)
            rates.append(flop / self.seconds(call))
        return statistics.median(rates)

    def _sized(self, make: Callable[[float], tuple[float, Call]]) -> float:
        """How many operations take about ``run_s``, found in growing steps.

        A small call says little of how fast a large one is, and on a busy machine it may be held up for longer than it runs: at least
        two steps are taken, and the fastest of them counts.
        """
        wanted, best = _FIRST_FLOP, 0.0
        for step in range(_MOST_STEPS):
            flop, call = make(wanted)
            taken = self._least(call)
            best = max(best, flop / taken)
            patience = _LARGEST_STEP if step < 2 else 1.0
            if taken > patience * self.effort.run_s or flop < wanted / 2:  # long enough, or as large as there is room for
                break
            wanted = flop * _LARGEST_STEP
        return best * self.effort.run_s

    def _least(self, call: Call) -> float:
        """Fewest seconds of three calls."""
        times = []
        call()
        for _ in range(3):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return max(min(times), 1e-9)

    def _matmul(self, dtype: torch.dtype, wanted_flop: float, shape: int) -> tuple[float, Call]:
        side = min((wanted_flop / 2) ** (1 / 3), math.sqrt(self.buffer_bytes / dtype.itemsize) / 2)
        rows, depth, columns = (_rounded(side * part) for part in _PROPORTIONS[shape])
        left = self._random(dtype, rows, depth)
        weight = self._random(dtype, columns, depth)
        return 2.0 * rows * depth * columns, lambda: functional.linear(left, weight)

    def _convolution(self, dtype: torch.dtype, wanted_flop: float, shape: int) -> tuple[float, Call]:
        channels = _CHANNELS[shape]
        per_pixel = 2.0 * channels * channels * 9
        most = math.sqrt(self.buffer_bytes / dtype.itemsize / channels)
        side = max(8, int(min(math.sqrt(wanted_flop / per_pixel), most)))
        image = self._random(dtype, 1, channels, side, side)
        weight = self._random(dtype, channels, channels, 3, 3)
        return per_pixel * side * side, lambda: functional.conv2d(image, weight, padding=1)

    def _attention(self, dtype: torch.dtype, wanted_flop: float, shape: int) -> tuple[float, Call]:
        heads, width = _HEADS[shape]
        most = self.buffer_bytes / dtype.itemsize / heads / width
        length = _rounded(min(math.sqrt(wanted_flop / (4 * heads * width)), most))
        query, key, value = (self._random(dtype, 1, heads, length, width) for _ in range(3))
        return 4.0 * heads * length * length * width, lambda: functional.scaled_dot_product_attention(query, key, value)

    def _random(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype).normal_()


def lower_quartile(times: Sequence[float]) -> float:
    """The time that a quarter of the calls beat. Other programs only ever make a call slower, so the median of a few would measure them
    too; the very fastest may have met a clock that does not last."""
    return sorted(times)[len(times) // 4]


def _rounded(size: float) -> int:
    """A multiple of 64, as hidden sizes of models are."""
    return max(_MULTIPLE, round(size / _MULTIPLE) * _MULTIPLE)
