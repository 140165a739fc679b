"""Buffers in RAM: filled before they are page-locked, and never lost when that is refused."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from pathlib import Path

import pytest
import torch

from overflowml_core.facts import Accelerator, HostMemory, Limits, Machine, Rates, Workload
from overflowml_core.planner import make_plan
from overflowml_core.runtime.device import CudaDevice, Device, HostDevice, OrderedDevice, StreamDevice
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import PLENTY, network, on_meta, rows, same, save, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device
from tests.vdevice import Faults

NBYTES = 3 * 4096 + 17


class Driver:
    """What ``torch.cuda.cudart()`` gives: registrations by address, each refused where ``refuses`` says so."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.registered: dict[int, int] = {}
        self.seen: list[bytes] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address % 4096 == nbytes % 4096 == 0
        self.seen.append(ctypes.string_at(address, NBYTES))
        if self.refuses:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def content() -> torch.Tensor:
    return (torch.arange(NBYTES) % 251).to(torch.uint8)


def cuda(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A CUDA device over a driver of ours, as far as host memory goes."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    device = CudaDevice.__new__(CudaDevice)
    Device.__init__(device, torch.device("cuda:0"))
    return device


def test_on_cuda_a_buffer_is_filled_before_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device = cuda(driver, monkeypatch)
    buffer = device.filled_buffer(NBYTES, True, lambda target: target.copy_(content()))
    assert driver.seen == [bytes(content().numpy())]
    assert driver.registered == {buffer.data_ptr(): 4 * 4096}
    assert (device.pinned.held_bytes, device.pageable.held_bytes) == (NBYTES, 0)
    del buffer
    gc.collect()
    assert driver.registered == {}
    assert device.pinned.held_bytes == 0


def test_on_cuda_a_refusal_loses_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = cuda(Driver(refuses=True), monkeypatch)
    with caplog.at_level(logging.WARNING, "overflowml"):
        buffer = device.filled_buffer(NBYTES, True, lambda target: target.copy_(content()))
    assert torch.equal(buffer, content())
    assert (device.pinned.held_bytes, device.pageable.held_bytes) == (0, NBYTES)
    assert "refused" in caplog.text


@pytest.mark.parametrize("nbytes", [0, NBYTES])
@pytest.mark.parametrize("pin", [False, True])
def test_whatever_the_device_a_buffer_has_its_content(nbytes: int, pin: bool, monkeypatch: pytest.MonkeyPatch, vgpu: Virtual) -> None:
    for device in (HostDevice(), vgpu.device, cuda(Driver(), monkeypatch)):
        buffer = device.filled_buffer(nbytes, pin, lambda target: target.copy_(content()[:nbytes]))
        assert torch.equal(buffer, content()[:nbytes])
        locked = nbytes if pin and isinstance(device, StreamDevice) else 0
        assert (device.pinned.held_bytes, device.pageable.held_bytes) == (locked, nbytes - locked)


def test_a_refused_pin_on_other_devices_is_filled_too(vgpu: Virtual, caplog: pytest.LogCaptureFixture) -> None:
    vgpu.sim.faults = Faults(pin={1})
    with caplog.at_level(logging.WARNING, "overflowml"):
        buffer = vgpu.device.filled_buffer(NBYTES, True, lambda target: target.copy_(content()))
    assert torch.equal(buffer, content())
    assert "refused" in caplog.text


def test_a_fill_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device = cuda(driver, monkeypatch)

    def fill(_: torch.Tensor) -> None:
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        device.filled_buffer(NBYTES, True, fill)
    assert driver.registered == {}
    assert (device.pinned.held_bytes, device.pageable.held_bytes) == (0, 0)


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_in_unified_memory_no_weight_is_held_twice(phases: int, share: float, tmp_path: Path, vgpu: Virtual) -> None:
    """A device without streams whose memory is RAM, as MPS: homes are files, and beside the device there is the reading ring alone."""
    plain = {f"part{i}": stack(8, 64, seed=i, ends=True) for i in range(phases)}
    expected = {name: on_device(module, rows(64)) for name, module in plain.items()}
    modules, loading = dict(plain), None
    if phases == 1:
        twin, loading = on_meta(plain["part0"], save(dict(plain["part0"].named_parameters()), tmp_path / "model.safetensors"))
        modules = {"part0": twin}
    device, described = OrderedDevice(vgpu.device.torch_device), network(modules)
    machine = Machine(
        (Accelerator("mps", "Apple", 0, PLENTY, PLENTY, unified=True),), HostMemory(PLENTY, PLENTY, 0, 2), Rates(1e9, 1e9, 1e9), PLENTY
    )
    budget = int(described.components[0].slab_bytes * share) + 4096
    plan = make_plan(described, machine, Workload(), Limits.exactly(device_memory=budget, reserve=0))
    engine = Engine(plan, described, device, tmp_path).attach(modules, loading)
    for name, module in modules.items():
        assert same(call(module, rows(64)), expected[name])
    ring = 2 * max(phase.slot_bytes for phase in plan.phases)
    assert device.arenas.peak_bytes <= budget
    assert device.pageable.peak_bytes + device.pinned.peak_bytes <= ring
    engine.detach()
