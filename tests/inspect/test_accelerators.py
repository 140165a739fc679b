"""Devices through a fake torch: what each driver says, and what happens when it fails."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from overflowml_core.inspect import accelerators
from overflowml_core.inspect.accelerators import find_accelerators
from overflowml_core.inspect.machine import ASSUMED_DISK_BYTES_PER_S, ASSUMED_LINK_BYTES_PER_S, detect_machine

GIB = 2**30


class FakeDevices:
    """A module such as torch.cuda, for cards of 24 GiB with 20 free, of which torch caches 3 and uses 1."""

    def __init__(self, count=1, available=True, integrated=False, failing=()):
        self.count, self.available, self.integrated, self.failing = count, available, integrated, failing

    def is_available(self):
        return self.available

    def device_count(self):
        return self.count

    def mem_get_info(self, index):
        if index in self.failing:
            raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")
        return 20 * GIB, 24 * GIB

    def memory_reserved(self, index):
        return 3 * GIB

    def memory_allocated(self, index):
        return GIB

    def get_device_name(self, index):
        return f"Card {index}"

    def get_device_properties(self, index):
        return SimpleNamespace(is_integrated=int(self.integrated))


class FakeThirdParty:
    """The least that a PrivateUse1 backend must offer."""

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def mem_get_info(self, index):
        return GIB, 2 * GIB


class FakeTorch(SimpleNamespace):
    def get_device_module(self, kind):
        return getattr(self, kind)


def fake_torch(current=None, hip=None, mps=False, **kinds):
    metal = SimpleNamespace(recommended_max_memory=lambda: 12 * GIB, driver_allocated_memory=lambda: 2 * GIB)
    return FakeTorch(
        version=SimpleNamespace(hip=hip),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        accelerator=SimpleNamespace(current_accelerator=lambda: SimpleNamespace(type=current) if current else None),
        mps=metal,
        **kinds,
    )


@pytest.fixture
def install(monkeypatch):
    def put(torch):
        monkeypatch.setitem(sys.modules, "torch", torch)
        return torch

    return put


def test_without_torch_there_are_none(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_accelerators() == []
    assert not caplog.records


def test_torch_that_cannot_be_imported_is_logged(monkeypatch, caplog):
    def broken(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerators.importlib, "import_module", broken)
    assert find_accelerators() == []
    assert "libcudart" in caplog.text


def test_a_build_for_the_cpu_has_none(install, caplog):
    install(fake_torch(cuda=FakeDevices(available=False)))
    assert find_accelerators() == []
    assert not caplog.records


def test_cuda_counts_what_torch_has_cached_as_free(install):
    install(fake_torch("cuda", cuda=FakeDevices(count=2)))
    first, second = find_accelerators()
    assert (first.kind, first.backend, first.name, first.index, first.unified) == ("cuda", "cuda", "Card 0", 0, False)
    assert (first.total_bytes, first.free_bytes) == (24 * GIB, 22 * GIB)
    assert second.torch_name == "cuda:1"


def test_free_is_never_more_than_total(install):
    devices = FakeDevices()
    devices.memory_reserved = lambda index: 30 * GIB
    install(fake_torch("cuda", cuda=devices))
    assert find_accelerators()[0].free_bytes == 24 * GIB


def test_rocm_is_cuda_by_kind(install):
    install(fake_torch("cuda", hip="6.4", cuda=FakeDevices()))
    found = find_accelerators()[0]
    assert (found.kind, found.backend) == ("cuda", "rocm")


def test_integrated_card_shares_the_hosts_memory(install):
    install(fake_torch("cuda", cuda=FakeDevices(integrated=True)))
    assert find_accelerators()[0].unified


def test_xpu(install):
    install(fake_torch("xpu", cuda=FakeDevices(available=False), xpu=FakeDevices()))
    found = find_accelerators()
    assert [(a.kind, a.backend, a.torch_name) for a in found] == [("xpu", "xpu", "xpu:0")]


def test_mps_is_unified_and_knows_what_it_may_take(install):
    install(fake_torch("mps", mps=True, cuda=FakeDevices(available=False)))
    (found,) = find_accelerators()
    assert (found.kind, found.backend, found.torch_name, found.unified) == ("mps", "mps", "mps", True)
    assert (found.total_bytes, found.free_bytes) == (12 * GIB, 10 * GIB)


def test_third_party_device_needs_little_and_comes_first(install):
    install(fake_torch("npu", cuda=FakeDevices(), npu=FakeThirdParty()))
    first, second = find_accelerators()
    assert (first.kind, first.name, first.backend, first.free_bytes, first.total_bytes) == ("npu", "npu", "npu", GIB, 2 * GIB)
    assert second.kind == "cuda"


def test_torch_before_the_accelerator_api(install):
    torch = install(fake_torch(cuda=FakeDevices()))
    del torch.accelerator
    assert [a.kind for a in find_accelerators()] == ["cuda"]


def test_one_failing_card_is_logged_and_leaves_the_others(install, caplog):
    install(fake_torch("cuda", cuda=FakeDevices(count=3, failing=(1,))))
    assert [a.index for a in find_accelerators()] == [0, 2]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "cuda:1" in record.getMessage()
    assert "unknown error" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("call", ["is_available", "device_count"])
def test_failing_driver_is_logged_and_leaves_other_kinds(install, caplog, call):
    def fails():
        raise AssertionError

    broken = FakeDevices()
    setattr(broken, call, fails)
    install(fake_torch("cuda", cuda=broken, xpu=FakeDevices()))
    assert [a.kind for a in find_accelerators()] == ["xpu"]
    assert "cuda: the driver failed (AssertionError: )" in caplog.text


def test_failing_accelerator_api_is_logged(install, caplog):
    def fails():
        raise RuntimeError("two backends")

    torch = install(fake_torch(cuda=FakeDevices()))
    torch.accelerator.current_accelerator = fails
    assert len(find_accelerators()) == 1
    assert "two backends" in caplog.text


def test_real_torch_answers():
    pytest.importorskip("torch")
    for found in find_accelerators():
        assert 0 < found.free_bytes <= found.total_bytes


def test_machine_says_that_its_rates_are_assumed(tmp_path, install):
    install(fake_torch("cuda", cuda=FakeDevices()))
    machine = detect_machine(find_accelerators(), tmp_path)
    assert machine.rates.measured is False
    assert machine.rates.h2d_bytes_per_s == machine.rates.d2h_bytes_per_s == ASSUMED_LINK_BYTES_PER_S
    assert machine.rates.disk_bytes_per_s == ASSUMED_DISK_BYTES_PER_S
    assert machine.compute.name == "Card 0"
    assert machine.disk_free_bytes > 0


def test_machine_without_accelerator_computes_on_the_cpu(tmp_path):
    machine = detect_machine([], tmp_path / "not made yet")
    assert machine.compute.kind == "cpu"
    assert 0 < machine.host.available_bytes <= machine.host.total_bytes
    assert machine.host.core_count >= 1


def test_import_brings_no_torch():
    code = "import sys, overflowml_core.inspect; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
