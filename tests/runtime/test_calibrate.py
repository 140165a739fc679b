"""Measuring really measures: rates have the right order of magnitude, everything is cleaned up, and what fails keeps what was known."""

import errno
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from overflowml_core.facts import Accelerator, HostMemory, Machine, Rates
from overflowml_core.runtime import bench, calibrate, disk_rate
from overflowml_core.runtime.bench import Bench, Effort, lower_quartile
from overflowml_core.runtime.bench_code import TinyBlock
from overflowml_core.runtime.calibrate import measure_ops
from overflowml_core.runtime.disk_rate import disk_read_rate, files_read_rate
from overflowml_core.runtime.fake import tracing
from overflowml_core.runtime.probe_works import Recipe, TensorSpec

GIB = 2**30
MIB = 2**20
KNOWN = Rates(1e9, 1e9, 7e8, op_seconds=(("old", 1.0),))
TINY = Effort(run_s=0.002, repeats=2, buffer_bytes=4 * MIB, disk_bytes=64 * MIB, shapes=1)


def machine(*accelerators, rates=KNOWN):
    return Machine(accelerators, HostMemory(8 * GIB, 4 * GIB, 2 * GIB, 2), rates, GIB)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(calibrate, "QUICK", TINY)


def test_cpu_and_disk_are_measured_and_nothing_is_left(tmp_path):
    seen = []
    measured = calibrate.calibrate(machine(), tmp_path, seen.append, quick=True)
    rates = measured.rates
    assert rates.measured
    assert measured.cpu_rates is None
    assert seen == ["disk reads", "CPU"]
    assert list(tmp_path.iterdir()) == []
    # A tenth of the slowest and ten times the fastest machine that there is: a unit that is wrong is off by a thousand.
    assert 1e8 < rates.memory_bytes_per_s < 1e13
    assert 1e8 < rates.h2d_bytes_per_s == rates.d2h_bytes_per_s == rates.pageable_h2d_bytes_per_s < 1e13
    assert 1e6 < rates.disk_bytes_per_s < 1e12
    assert 1e-8 < rates.launch_s < 1e-2
    for kind in ("matmul", "conv", "attention"):
        assert 1e8 < rates.flop_per_s(kind, "F32") < 1e15
    assert {(rate.kind, rate.dtype) for rate in rates.compute} >= {("matmul", "BF16"), ("attention", "F16")}


@pytest.mark.parametrize(("percent", "warned"), [(3.0, False), (60.0, True)])
def test_busy_machine_is_warned_of(tmp_path, monkeypatch, caplog, percent, warned):
    monkeypatch.setattr(calibrate.psutil, "cpu_percent", lambda interval: percent)
    monkeypatch.setattr(calibrate, "_rates_of", lambda *arguments: KNOWN)
    calibrate.calibrate(machine(), tmp_path, quick=True)
    assert ("other programs take 60 % of the CPU" in caplog.text) is warned


def test_operations_of_an_earlier_measurement_stay(tmp_path):
    before = machine(rates=replace(KNOWN, source="measured"))
    assert calibrate.calibrate(before, tmp_path, quick=True).rates.op_seconds == (("old", 1.0),)
    assert calibrate.calibrate(machine(), tmp_path, quick=True).rates.op_seconds == ()


def test_device_that_fails_keeps_its_rates_and_the_cpu_is_measured(tmp_path, caplog):
    card = Accelerator("cuda", "Card", 0, GIB, GIB, rates=KNOWN)
    if torch.cuda.is_available():
        pytest.skip("there is a device of this name")
    measured = calibrate.calibrate(machine(card), tmp_path, quick=True)
    assert (measured.rates, measured.accelerators[0].rates) == (KNOWN, KNOWN)
    assert measured.cpu_rates.measured
    assert "cuda:0 cannot be measured" in caplog.text


def test_disk_that_cannot_be_measured_keeps_its_rate(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    measured = calibrate.calibrate(machine(), tmp_path / "file", quick=True)
    assert measured.rates.disk_bytes_per_s == KNOWN.disk_bytes_per_s
    assert "disk reads cannot be measured" in caplog.text


def test_disk_file_is_removed_when_reading_fails(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(disk_rate, "_read", fails)
    with pytest.raises(OSError, match="broken"):
        disk_read_rate(tmp_path, 64 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_disk_file_is_removed_when_writing_fails(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(disk_rate, "_write", fails)
    with pytest.raises(OSError, match="full"):
        disk_read_rate(tmp_path, 64 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_at_most_a_tenth_of_the_free_space_is_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(disk_rate.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 * MIB))
    write = disk_rate._write
    monkeypatch.setattr(disk_rate, "_write", lambda descriptor, buffer: (written.append(len(buffer)), write(descriptor, buffer)))
    assert disk_read_rate(tmp_path, GIB) > 0
    assert sum(written) == 96 * MIB


def test_full_disk_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_rate.shutil, "disk_usage", lambda path: SimpleNamespace(free=600 * MIB))
    with pytest.raises(OSError, match="bytes are free"):
        disk_read_rate(tmp_path, GIB)
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_direct_reads_is_read_plainly(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(disk_rate, "_DIRECT", 0x40000000)
    real = os.open

    def refuses_direct(path, flags, *arguments):
        if flags & 0x40000000:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *arguments)

    monkeypatch.setattr(disk_rate.os, "open", refuses_direct)
    assert disk_read_rate(tmp_path, 64 * MIB) > 0
    assert "no direct reads here" in caplog.text


def test_files_of_a_model_tell_how_fast_their_disk_is(tmp_path, monkeypatch):
    for name, size in (("a", 40 * MIB), ("b", 41 * MIB), ("short", MIB)):
        (tmp_path / name).write_bytes(bytes(size))
    files, read, real = [tmp_path / name for name in ("a", "b", "short")], [], disk_rate._read
    monkeypatch.setattr(disk_rate, "_read", lambda descriptor, offset, buffer: (read.append(offset), real(descriptor, offset, buffer)))
    assert files_read_rate(files, GIB) > 0
    assert sorted(read) == sorted(2 * [number * 8 * MIB for number in range(5)])
    before = replace(machine(), cpu_rates=KNOWN)
    monkeypatch.setattr(calibrate, "files_read_rate", lambda files, nbytes: 7e8)
    after = calibrate.with_disk_of(before, files)
    assert (after.rates, after.cpu_rates) == (replace(before.rates, disk_bytes_per_s=7e8), replace(KNOWN, disk_bytes_per_s=7e8))
    assert {one.rates.disk_bytes_per_s for one in after.accelerators if one.rates is not None} <= {7e8}


def test_few_bytes_of_a_model_tell_nothing_of_its_disk(tmp_path):
    (tmp_path / "a").write_bytes(bytes(MIB))
    for files in ([], [tmp_path / "a"], [tmp_path / "gone"]):
        with pytest.raises(OSError):  # noqa: PT011 -- each system has its own words
            files_read_rate(files, GIB)
        assert calibrate.with_disk_of(machine(), files) == machine()


def test_missing_folder_is_made(tmp_path):
    assert disk_read_rate(tmp_path / "a" / "b", 64 * MIB) > 0


def test_kind_that_a_device_refuses_is_left_out(monkeypatch):
    def refuses(self, dtype, flop, shape):
        raise RuntimeError('"slow_conv2d_cpu" not implemented for this dtype')

    monkeypatch.setattr(Bench, "_convolution", refuses)
    rates = list(Bench(machine().cpu, TINY).compute_rates())
    assert {rate.kind for rate in rates} == {"matmul", "attention"}


def test_sizes_grow_until_a_call_is_long_enough(monkeypatch):
    bench_of_cpu = Bench(machine().cpu, TINY)
    tried, now_s = [], [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    def make(flop):
        tried.append(flop)
        return flop, lambda: now_s.__setitem__(0, now_s[0] + flop / 2e10)  # a device of 20 GFLOP/s

    assert bench_of_cpu._sized(make) == pytest.approx(2e10 * TINY.run_s)
    assert tried == sorted(tried)


def test_a_machine_with_little_memory_is_given_small_buffers(monkeypatch):
    monkeypatch.setattr(bench.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert Bench(machine().cpu, TINY).buffer_bytes == MIB
    monkeypatch.setattr(bench.psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * MIB))
    assert Bench(machine().cpu, TINY).buffer_bytes == 2 * MIB


@pytest.mark.parametrize(("times", "expected"), [([3.0], 3.0), ([2.0, 1.0, 9.0], 1.0), ([7, 6, 5, 4, 3, 2, 1], 2), ([8, 1, 2, 3], 2)])
def test_lower_quartile(times, expected):
    assert lower_quartile(times) == expected


def test_rounding_keeps_sizes_of_models():
    assert [bench._rounded(size) for size in (0, 31, 96, 100, 1000)] == [64, 64, 128, 128, 1024]


def spec(*shape, dtype=torch.float32):
    return TensorSpec(shape, tuple(torch.empty(shape, device="meta").stride()), dtype)


def test_operations_are_timed_one_by_one():
    recipes = {
        "small": Recipe(torch.ops.aten.mm.default, (spec(32, 32), spec(32, 32))),
        "large": Recipe(torch.ops.aten.mm.default, (spec(512, 512), spec(512, 512))),
        "add": Recipe(torch.ops.aten.add.Tensor, (spec(64, 64), spec(64, 64))),
    }
    found = measure_ops(recipes, "cpu", 20.0)
    assert set(found) == set(recipes)
    assert 0 < found["small"] < found["large"] < 10


def test_operation_that_fails_or_does_not_fit_is_left_out():
    recipes = {
        "wrong": Recipe(torch.ops.aten.mm.default, (spec(3, 4), spec(3, 4))),
        "huge": Recipe(torch.ops.aten.neg.default, (spec(2**20, 2**20),)),
        "right": Recipe(torch.ops.aten.neg.default, (spec(8, 8),)),
    }
    assert set(measure_ops(recipes, "cpu", 20.0)) == {"right"}


def test_budget_of_nothing_measures_nothing():
    assert measure_ops({"a": Recipe(torch.ops.aten.neg.default, (spec(8, 8),))}, "cpu", 0.0) == {}


@pytest.fixture
def virtual(vgpu):
    return Accelerator("vgpu", "virtual accelerator", 0, GIB, GIB, backend="vgpu")


def test_device_with_streams_is_measured_through_torchs_own_interface(virtual, tmp_path):
    measured = calibrate.calibrate(machine(virtual), tmp_path, quick=True)
    (rates,) = {accelerator.rates for accelerator in measured.accelerators}
    assert measured.rates == rates
    assert rates.measured
    assert measured.cpu_rates.measured
    assert rates.pageable_h2d_bytes_per_s > 0
    assert rates.flop_per_s("matmul", "BF16") > 0


def test_operations_of_a_device_with_events_are_timed_by_its_clock(virtual):
    recipes = {size: Recipe(torch.ops.aten.mm.default, (spec(size, size), spec(size, size))) for size in (64, 512)}
    found = measure_ops(recipes, "vgpu", 20.0)
    assert 0 < found[64] < found[512]


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [((4, 4), (4, 1), 64), ((4, 4), (0, 1), 16), ((0, 4), (4, 1), 0), ((), (), 4), ((2, 3), (1, 2), 24)],
)
def test_bytes_of_an_argument_are_those_of_its_storage(shape, stride, expected):
    assert calibrate._spec_bytes(TensorSpec(shape, stride, torch.float32)) == expected


def test_operations_of_the_tiny_block_are_counted_right():
    with tracing() as tracer, torch.device("meta"):
        block = TinyBlock(torch.device("meta"))
        tracer.watch("block", block)
        block(*block.inputs())
        (call,) = tracer.calls
    assert sum(work.calls for work in call.outside) == TinyBlock.OPERATIONS
