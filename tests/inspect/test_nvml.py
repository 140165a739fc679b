"""NVIDIA's library through an object with its functions, and through ctypes with a library compiled for the test."""

import ctypes
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from overflowml_core.inspect import devices, nvml
from overflowml_core.inspect.devices import driver_devices, find_devices
from overflowml_core.inspect.driver import Link
from overflowml_core.inspect.nvml import Nvml, bus_id, read_nvml

GIB = 2**30


class FakeNvml:
    """pynvml with cards of 24 GiB, 20 of them free; ``without`` are functions that the card lacks."""

    def __init__(self, count=1, without=(), width=16, current=1, most=4, name=b"NVIDIA GeForce RTX 4090"):
        self.count, self.without, self.width, self.current, self.most, self.name = count, set(without), width, current, most, name
        self.shut_down = 0

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in object.__getattribute__(self, "without"):

            def refuse(*arguments):
                raise RuntimeError(f"{name}: Not Supported")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        self.shut_down += 1

    def nvmlSystemGetDriverVersion(self):
        return b"570.86.10"

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.name

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-0000-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=24 * GIB, free=20 * GIB, used=4 * GIB)

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=f"00000000:{handle + 1:02X}:00.0".encode())

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (8, 9)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        return self.current

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return self.width

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return self.most

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetCurrentDriverModel(self, handle):
        return 0


def test_facts_of_a_card():
    (card,) = read_nvml(FakeNvml())
    assert (card.kind, card.backend, card.name) == ("cuda", "cuda", "NVIDIA GeForce RTX 4090")
    assert (card.total_bytes, card.free_bytes, card.unified) == (24 * GIB, 20 * GIB, False)
    assert (card.uuid, card.bus_id, card.capability, card.driver) == ("0000-0", "0000:01:00.0", "8.9", "570.86.10")


def test_link_of_an_idle_card_is_the_one_that_copies_raise():
    (card,) = read_nvml(FakeNvml(current=1, most=4))
    assert card.link == Link(generation=4, lanes=16, current_generation=1, most_lanes=16)
    assert str(card.link) == "PCIe 4.0 x16"
    assert not card.link.narrow


def test_card_in_a_narrow_slot_is_seen():
    (card,) = read_nvml(FakeNvml(width=4))
    assert str(card.link) == "PCIe 4.0 x4"
    assert card.link.narrow


@pytest.mark.parametrize(("width", "most"), [(0, 4), (16, 0), (1000, 4), (16, 99), (-1, 4)])
def test_absurd_links_are_no_links(width, most):
    assert read_nvml(FakeNvml(width=width, most=most))[0].link is None


def test_every_extra_may_be_missing():
    extras = [n for n in dir(FakeNvml) if n.startswith("nvmlDeviceGet") and n not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")]
    extras = [name for name in extras if name != "nvmlDeviceGetName"]
    (card,) = read_nvml(FakeNvml(without=[*extras, "nvmlSystemGetDriverVersion"]))
    assert (card.name, card.capability, card.driver, card.link, card.uuid, card.bus_id) == ("NVIDIA GeForce RTX 4090", "", "", None, "", "")


def test_card_without_memory_of_its_own_takes_three_quarters_of_ram(monkeypatch):
    library = FakeNvml(without=["nvmlDeviceGetMemoryInfo"], name=b"NVIDIA GB10")
    monkeypatch.setattr(nvml, "open_nvml", lambda: library)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * GIB, available=120 * GIB))
    (card,) = driver_devices(platform="linux")
    assert (card.unified, card.total_bytes, card.free_bytes) == (True, 96 * GIB, 96 * GIB)


def test_one_failing_card_leaves_the_others(caplog):
    library = FakeNvml(count=3)
    handle_of = library.nvmlDeviceGetHandleByIndex

    def fails_for_one(index):
        if index == 1:
            raise RuntimeError("GPU is lost")
        return handle_of(index)

    library.nvmlDeviceGetHandleByIndex = fails_for_one
    assert [card.uuid for card in read_nvml(library)] == ["0000-0", "0000-2"]
    assert "GPU is lost" in caplog.text
    assert library.shut_down == 1


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_failing_library_has_no_devices(call):
    assert read_nvml(FakeNvml(without=[call])) == []


def test_count_is_bounded():
    assert len(read_nvml(FakeNvml(count=10**9))) == 64


def test_find_devices_needs_no_torch_and_numbers_by_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "open_nvml", lambda: FakeNvml(count=2))
    first, second = find_devices(tmp_path, platform="linux")
    assert (first.torch_name, second.torch_name) == ("cuda:0", "cuda:1")
    assert first.features == {"bf16", "fp8", "int8"}
    assert (first.link, first.driver, first.capability) == ("PCIe 4.0 x16", "570.86.10", "8.9")


def test_no_library_means_no_devices(monkeypatch):
    monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvml, "_library_names", lambda: ["libdoes-not-exist.so.1"])
    assert read_nvml() == []


def test_another_library_of_that_name_is_not_taken(monkeypatch):
    monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvml, "_library_names", lambda: ["libm.so.6"])
    assert nvml.open_nvml() is None


@pytest.mark.parametrize(("text", "expected"), [("00000000:0A:00.0", "0000:0a:00.0"), ("0000:01:00.0", "0000:01:00.0"), ("", "")])
def test_bus_ids_have_one_form(text, expected):
    assert bus_id(text) == expected


SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
static int text(char *out, unsigned length, const char *value) { strncpy(out, value, length); return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned length) { return text(out, length, "580.1"); }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) { if (index == 1) return 15; *out = (void *)0x7fff12345678; return 0; }
static int wrong(void *handle) { return handle != (void *)0x7fff12345678; }
int nvmlDeviceGetName(void *h, char *out, unsigned length) { return wrong(h) ? 2 : text(out, length, "NVIDIA L4"); }
int nvmlDeviceGetUUID(void *h, char *out, unsigned length) { return wrong(h) ? 2 : text(out, length, "GPU-abc"); }
int nvmlDeviceGetMemoryInfo(void *h, memory_t *out) { if (wrong(h)) return 2; out->total = 24ull << 30; out->free = 23ull << 30; return 0; }
int nvmlDeviceGetPciInfo_v3(void *h, pci_t *out) { return wrong(h) ? 2 : text(out->bus_id, 32, "00000000:65:00.0"); }
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) { *major = 8; *minor = 9; return wrong(h); }
int nvmlDeviceGetCurrPcieLinkGeneration(void *h, unsigned *out) { *out = 3; return wrong(h); }
int nvmlDeviceGetCurrPcieLinkWidth(void *h, unsigned *out) { *out = 8; return wrong(h); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *h, unsigned *out) { *out = 4; return wrong(h); }
int nvmlDeviceGetMaxPcieLinkWidth(void *h, unsigned *out) { *out = 16; return wrong(h); }
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs a C compiler")
def test_ctypes_speaks_the_librarys_interface(tmp_path, caplog):
    (tmp_path / "nvml.c").write_text(SOURCE)
    library = tmp_path / "libnvidia-ml.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")], check=True, timeout=60)
    (card,) = read_nvml(Nvml(ctypes.CDLL(str(library))))
    assert (card.name, card.uuid, card.bus_id, card.capability, card.driver) == ("NVIDIA L4", "abc", "0000:65:00.0", "8.9", "580.1")
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 23 * GIB)
    assert card.link == Link(generation=4, lanes=8, current_generation=3, most_lanes=16)
    assert "device 1 failed (nvmlDeviceGetHandleByIndex_v2 returned 15)" in caplog.text
