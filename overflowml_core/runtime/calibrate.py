"""Measures how fast this machine computes and moves bytes, in seconds. Keeps nothing: whoever calls this stores the machine it returns."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch

from overflowml_core.machine import Accelerator, Machine, Rates
from overflowml_core.runtime.bench import FULL, QUICK, Bench, Call, Effort, lower_quartile, made_current
from overflowml_core.runtime.company import Part, time_in_company
from overflowml_core.runtime.disk_rate import disk_read_rate, files_read_rate
from overflowml_core.runtime.probe import run_recipe
from overflowml_core.runtime.probe_works import Recipe, TensorSpec

_log = logging.getLogger("overflowml")

Progress: TypeAlias = Callable[[str], None]

_LOOK_S = 0.2
_BUSY_SHARE = 0.15
_LEAST_REPEATS, _MOST_REPEATS = 3, 9
_REPEAT_S = 0.15
_EVICT_BYTES = 128 * 2**20
"""What is written between two timings so that weights come from memory, as they do in a model that is larger than the caches."""
_LARGEST_SHARE = 4
_WEIGHT_OPERATIONS = ("linear", "addmm", "mm", "bmm", "baddbmm", "convolution", "_grouped_mm", "embedding")


def calibrate(machine: Machine, folder: str | os.PathLike[str], progress: Progress | None = None, quick: bool = False) -> Machine:
    """The machine with rates that were measured on it now, of every accelerator, the CPU and the disk.

    Takes ten to twenty seconds on two cores, a third of that when quick; nothing else should run meanwhile. Operations measured one by
    one before are kept. A part that cannot be measured keeps the rate that the machine had, with a warning.

    Args:
        machine: as detected.
        folder: where a temporary file is read from; at most a tenth of its free space is used.
        progress: called with what is being measured, in words.
        quick: fewer and smaller measurements, for tests and impatient users.
    """
    effort = QUICK if quick else FULL
    tell = progress or _silent
    _warn_when_busy()
    tell("disk reads")
    disk = _disk_rate(Path(folder), effort, machine.rates.disk_bytes_per_s)
    tell("CPU")
    cpu = _rates_of(machine.cpu, effort, disk, machine.cpu_rates if machine.accelerators else machine.rates)
    if not machine.accelerators:
        return replace(machine, rates=cpu, cpu_rates=None, named=False)
    measured = []
    for index, accelerator in enumerate(machine.accelerators):
        tell(accelerator.name)
        try:
            rates = _rates_of(accelerator, effort, disk, machine.rates_of(index))
        except (RuntimeError, AssertionError) as error:  # out of memory included; a build without the device asserts
            _log.warning("%s cannot be measured (%s): its rates stay %s", accelerator.torch_name, error, machine.rates_of(index).source)
            rates = machine.rates_of(index)
        measured.append(replace(accelerator, rates=rates))
    first = measured[0].rates
    return replace(machine, accelerators=tuple(measured), rates=first or machine.rates, cpu_rates=cpu, named=False)


def _silent(_: str) -> None:
    pass


def _warn_when_busy() -> None:
    busy = psutil.cpu_percent(interval=_LOOK_S) / 100
    if busy > _BUSY_SHARE:
        _log.warning(
            "other programs take %.0f %% of the CPU: what is measured now is too slow; calibrate again when they are done", 100 * busy
        )


def _disk_rate(folder: Path, effort: Effort, known: float) -> float:
    try:
        return disk_read_rate(folder, effort.disk_bytes)
    except OSError as error:
        _log.warning("%s: disk reads cannot be measured (%s); %.1f GB/s stay assumed", folder, error, known / 1e9)
        return known


def with_disk_of(machine: Machine, files: Sequence[Path], quick: bool = False) -> Machine:
    """The machine with the rate at which the disk reads these files; as it is where they are few or cannot be read."""
    try:
        rate = files_read_rate(files, (QUICK if quick else FULL).disk_bytes)
    except OSError as error:
        _log.info("reads of the model's own files are not measured: %s", error)
        return machine
    accelerators = tuple(replace(one, rates=_with_disk(one.rates, rate)) for one in machine.accelerators)
    rates, cpu_rates = replace(machine.rates, disk_bytes_per_s=rate), _with_disk(machine.cpu_rates, rate)
    return replace(machine, accelerators=accelerators, rates=rates, cpu_rates=cpu_rates)


def _with_disk(rates: Rates | None, bytes_per_s: float) -> Rates | None:
    return None if rates is None else replace(rates, disk_bytes_per_s=bytes_per_s)


def _rates_of(accelerator: Accelerator, effort: Effort, disk_bytes_per_s: float, known: Rates | None) -> Rates:
    bench = Bench(accelerator, effort)
    with torch.inference_mode(), made_current(bench.device):
        pinned, pageable = bench.copy_rates()
        return Rates(
            h2d_bytes_per_s=pinned[0],
            d2h_bytes_per_s=pinned[1],
            disk_bytes_per_s=disk_bytes_per_s,
            source="measured",
            pageable_h2d_bytes_per_s=pageable[0],
            pageable_d2h_bytes_per_s=pageable[1],
            memory_bytes_per_s=bench.memory_rate(),
            compute=tuple(bench.compute_rates()),
            launch_s=bench.launch_seconds(),
            op_seconds=known.op_seconds if known is not None and known.measured else (),
        )


def measure_ops(
    recipes: Mapping[str, Recipe], device: torch.device | str, seconds_budget: float, launch_s: float = 0.0
) -> dict[str, float]:
    """Seconds of one call of single operations.

    On a CPU they run in company, in the order of the recipes, and what a model's own code takes around an operation (``launch_s``) is
    added: there it is not hidden behind what computes. On other devices each is timed by itself: operations that read weights find the
    caches full of something else, as in a model that is larger than they are, the others find their inputs where they left them. What
    does not run here, takes more than a quarter of the free memory, or comes after the budget is spent, is missing in the answer.

    Args:
        recipes: operations by signature, as a trace collected them; the first are measured first.
        device: where to run them.
        launch_s: what an operation costs at least in a model's code, in seconds.
        seconds_budget: when to stop, in seconds; the operation under way is finished.
    """
    place = torch.device(device)
    until = time.perf_counter() + seconds_budget
    with torch.inference_mode(), made_current(place):
        clock = _OpClock(place)
        room_bytes = clock.free_bytes() // _LARGEST_SHARE
        small = {signature: recipe for signature, recipe in recipes.items() if _input_bytes(recipe) <= room_bytes}
        if place.type == "cpu":
            found = _in_company(small, room_bytes, until, launch_s)
        else:
            found = _one_by_one(clock, small, until)
    if len(found) < len(recipes):
        _log.info("%d of %d operations measured; the rest is estimated", len(found), len(recipes))
    return found


def _in_company(recipes: Mapping[str, Recipe], room_bytes: int, until: float, launch_s: float) -> dict[str, float]:
    cpu = torch.device("cpu")
    parts = [
        Part(signature, recipe, _input_bytes(recipe), _reads_weights(recipe), lambda recipe: run_recipe(recipe, cpu))
        for signature, recipe in recipes.items()
    ]
    found, failed = time_in_company(parts, room_bytes, until)
    for signature, error in failed.items():
        _tell_of(recipes[signature], error)
    return {signature: seconds + launch_s for signature, seconds in found.items()}


def _one_by_one(clock: _OpClock, recipes: Mapping[str, Recipe], until: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for signature, recipe in recipes.items():
        if time.perf_counter() >= until:
            break
        try:
            found[signature] = clock.seconds(run_recipe(recipe, clock.device), _reads_weights(recipe), until)
        except Exception as error:  # noqa: BLE001 -- an operation with random data may raise what it likes; it is estimated instead
            _tell_of(recipe, error)
    return found


def _tell_of(recipe: Recipe, error: Exception) -> None:
    _log.info("%s cannot be timed (%s: %s)", recipe.operation, type(error).__name__, next(iter(str(error).splitlines()), ""))


class _OpClock:
    """Times single calls: by events where the device has them, so that launching does not count, else by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._evictor = torch.zeros(_EVICT_BYTES // 4, device=device)

    def free_bytes(self) -> int:
        """Memory that inputs may be made in."""
        if self.module is None or not hasattr(self.module, "mem_get_info"):
            available: int = psutil.virtual_memory().available
            return available
        return int(self.module.mem_get_info(self.device)[0])

    def seconds(self, call: Call, cold: bool, until: float) -> float:
        """Seconds of a call; the first, which prepares kernels, does not count.

        Args:
            call: runs the operation once.
            cold: whether caches are emptied before each timing.
            until: time of the host's clock at which the least number of repeats is enough.
        """
        call()
        times: list[float] = []
        while len(times) < _LEAST_REPEATS or (len(times) < _MOST_REPEATS and sum(times) < _REPEAT_S and time.perf_counter() < until):
            if cold:
                self._evictor.add_(1.0)
            times.append(self._host_time(call) if self.module is None else self._device_time(call))
        return lower_quartile(times)

    def _host_time(self, call: Call) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def _device_time(self, call: Call) -> float:
        # The evictor, or an empty event, is still under way when the operation is queued, so that its launch is hidden.
        start, end = self.module.Event(enable_timing=True), self.module.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        self.module.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _reads_weights(recipe: Recipe) -> bool:
    name = str(getattr(getattr(recipe.operation, "_schema", None), "name", "")).rpartition("::")[2]
    return name in _WEIGHT_OPERATIONS


def _input_bytes(recipe: Recipe) -> int:
    values = (*recipe.args, *(value for _, value in recipe.kwargs))
    return sum(_spec_bytes(spec) for spec in _specs(values))


def _spec_bytes(spec: TensorSpec) -> int:
    """Bytes from the first element to the last; an expanded dimension takes none."""
    if 0 in spec.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
    element_bytes: int = spec.dtype.itemsize
    return (last + 1) * element_bytes


def _specs(values: Iterable[Any]) -> Iterator[TensorSpec]:
    for value in values:
        if isinstance(value, TensorSpec):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _specs(value)
