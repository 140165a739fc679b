"""What drivers and systems say, in trees that exist only in a test's folder; and when torch is worth importing."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from overflowml_core.inspect import accelerators, devices, torch_build
from overflowml_core.inspect.accelerators import find_accelerators, torch_may_have_devices
from overflowml_core.inspect.cpu import cpu_isa, cpu_name, last_level_cache_bytes
from overflowml_core.inspect.driver import DriverDevice, Link
from overflowml_core.inspect.drm import drm_devices
from overflowml_core.inspect.features import features_of
from overflowml_core.inspect.platforms import environment_words
from tests.inspect.test_accelerators import GIB, FakeDevices, fake_torch

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def amd_card(root):
    address = "sys/devices/pci0000:00/0000:03:00.0"
    files = {
        "vendor": "0x1002",
        "device": "0x744c",
        "product_name": "Radeon RX 7900 XTX",
        "mem_info_vram_total": 24 * GIB,
        "mem_info_vram_used": GIB,
        "current_link_speed": "2.5 GT/s PCIe",
        "max_link_speed": "16.0 GT/s PCIe",
        "current_link_width": 16,
        "max_link_width": 16,
    }
    tree(root, {f"{address}/{name}": text for name, text in files.items()})
    tree(root, {"sys/class/kfd/kfd/topology/nodes/0/properties": "location_id 0\ngfx_target_version 0"})
    tree(root, {"sys/class/kfd/kfd/topology/nodes/1/properties": f"location_id {3 << 8}\ngfx_target_version 110000"})
    card = root / "sys/class/drm/card1"
    card.mkdir(parents=True)
    (card / "device").symlink_to(root / address)
    (root / "sys/class/drm/card1-DP-1").mkdir()
    return root


def test_amd_card_in_sysfs(tmp_path):
    (card,) = drm_devices(amd_card(tmp_path))
    assert (card.kind, card.backend, card.name, card.capability) == ("cuda", "rocm", "Radeon RX 7900 XTX", "gfx1100")
    assert (card.total_bytes, card.free_bytes, card.bus_id) == (24 * GIB, 23 * GIB, "0000:03:00.0")
    assert card.link == Link(generation=4, lanes=16, current_generation=1, most_lanes=16)


def test_intel_card_with_memory_of_its_own_counts_and_one_without_does_not(tmp_path):
    tree(tmp_path, {"sys/class/drm/card0/device/vendor": "0x8086", "sys/class/drm/card0/device/device": "0x4680"})
    tree(tmp_path, {"sys/class/drm/card1/device/vendor": "0x8086", "sys/class/drm/card1/lmem_total_bytes": 16 * GIB})
    assert [(d.kind, d.total_bytes) for d in drm_devices(tmp_path)] == [("xpu", 16 * GIB)]


@pytest.mark.parametrize("text", ["", "garbage", "-1", "9" * 40, "0"])
def test_unreadable_memory_in_sysfs_is_no_device(tmp_path, text):
    tree(tmp_path, {"sys/class/drm/card0/device/vendor": "0x1002", "sys/class/drm/card0/device/mem_info_vram_total": text})
    assert drm_devices(tmp_path) == []


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("cuda", "6.1", set()),
        ("cuda", "7.5", {"int8"}),
        ("cuda", "8.6", {"int8", "bf16"}),
        ("cuda", "8.9", {"int8", "bf16", "fp8"}),
        ("cuda", "12.0", {"int8", "bf16", "fp8", "nvfp4"}),
        ("cuda", "", set()),
        ("cuda", "many", set()),
        ("rocm", "gfx1030", set()),
        ("rocm", "gfx906", set()),
        ("rocm", "gfx1100", {"int8", "bf16"}),
        ("rocm", "gfx90a", {"int8", "bf16"}),
        ("rocm", "gfx942", {"int8", "bf16", "fp8"}),
        ("rocm", "gfx1201", {"int8", "bf16", "fp8"}),
        ("mps", "", {"bf16"}),
        ("npu", "9.9", set()),
    ],
)
def test_features_follow_the_instruction_set(backend, capability, expected):
    assert features_of(backend, capability) == expected


@LINUX
def test_cpu_by_its_own_words(tmp_path):
    tree(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU 9000\nflags\t\t: fpu avx2 avx512f amx_bf16\nmodel name : other"})
    assert cpu_name(tmp_path) == "Some CPU 9000"
    assert cpu_isa(tmp_path) == {"avx2", "avx512f", "amx_bf16"}


@LINUX
def test_arm_cpu_has_neon_and_no_name(tmp_path):
    tree(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd bf16 i8mm sve"})
    assert cpu_isa(tmp_path) == {"neon", "bf16", "i8mm", "sve"}
    assert cpu_name(tmp_path)


def test_largest_cache_counts(tmp_path):
    base = "sys/devices/system/cpu/cpu0/cache"
    assert last_level_cache_bytes(tree(tmp_path, {f"{base}/index0/size": "48K", f"{base}/index3/size": "32768K"})) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, {"linux"}),
        ({"proc/sys/kernel/osrelease": "6.6.87-microsoft-standard-WSL2"}, {"linux", "wsl2"}),
        ({"proc/version": "Linux version 4.4.0-Microsoft"}, {"linux"}),
        ({".dockerenv": ""}, {"linux", "container"}),
        ({"proc/1/cgroup": "0::/kubepods/besteffort/pod1"}, {"linux", "container"}),
        ({"proc/self/mountinfo": "30 1 0:31 / / rw - overlay overlay rw"}, {"linux", "container"}),
        ({"proc/self/mountinfo": "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 30 0:40 / /x rw - overlay overlay rw"}, {"linux"}),
    ],
)
def test_words_of_a_linux(tmp_path, files, words):
    assert environment_words(tree(tmp_path, files), "linux") == words


def test_words_of_other_systems(tmp_path):
    card = DriverDevice("cuda", "cuda", "Card", GIB, GIB, wddm=True)
    assert environment_words(tmp_path, "win32", [card]) == {"windows", "wddm"}
    assert environment_words(tmp_path, "win32") == {"windows"}
    assert environment_words(tmp_path, "darwin") == {"macos"}
    assert environment_words(tmp_path, "linux", [card]) == {"linux"}


def installed_torch(monkeypatch, tmp_path, text):
    folder = tmp_path / "site" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(text)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(folder)]))
    monkeypatch.setattr(accelerators, "has_backend_extension", lambda: False)


CUDA_BUILD = "__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\nxpu: Optional[str] = None\n"
CPU_BUILD = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
ROCM_BUILD = "__version__ = '2.13.0+rocm6.4'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n"
XPU_BUILD = "__version__ = '2.13.0+xpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = '20250101'\n"


def test_build_is_read_without_importing_torch(monkeypatch, tmp_path):
    installed_torch(monkeypatch, tmp_path, CUDA_BUILD)
    build = torch_build.torch_build()
    assert (build.version, build.cuda, build.hip, build.xpu, build.known) == ("2.13.0+cu128", "12.8", "", "", True)
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("text", "files", "platform", "expected"),
    [
        (CUDA_BUILD, [], "linux", False),
        (CUDA_BUILD, ["dev/nvidia0"], "linux", True),
        (CUDA_BUILD, ["dev/dxg"], "linux", True),
        (CUDA_BUILD, ["dev/kfd", "dev/dri/renderD128"], "linux", False),
        (CPU_BUILD, ["dev/nvidia0", "dev/kfd", "dev/dri/renderD128"], "linux", False),
        (ROCM_BUILD, ["dev/kfd"], "linux", True),
        (ROCM_BUILD, ["dev/nvidia0"], "linux", False),
        (XPU_BUILD, ["dev/dri/renderD128"], "linux", True),
        (CPU_BUILD, [], "darwin", True),
        (CPU_BUILD, [], "win32", False),
        (CUDA_BUILD, [], "win32", True),
    ],
)
def test_torch_is_worth_importing_where_a_driver_and_the_build_agree(monkeypatch, tmp_path, text, files, platform, expected):
    installed_torch(monkeypatch, tmp_path, text)
    root = tree(tmp_path / "root", dict.fromkeys(files, ""))
    assert torch_may_have_devices(root, platform) is expected


def test_installed_backend_is_a_reason_to_import_torch(monkeypatch, tmp_path):
    installed_torch(monkeypatch, tmp_path, CPU_BUILD)
    monkeypatch.setattr(accelerators, "has_backend_extension", lambda: True)
    assert torch_may_have_devices(tmp_path, "linux")


def test_nothing_is_imported_without_evidence(monkeypatch, tmp_path):
    installed_torch(monkeypatch, tmp_path, CUDA_BUILD)
    monkeypatch.setattr(accelerators, "_import_torch", lambda: pytest.fail("torch was imported"))
    assert find_accelerators(tmp_path) == []


def use(monkeypatch, torch, *found):
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(accelerators, "driver_devices", lambda root: list(found))


def card(name, uuid="", bus="", lanes=16):
    return DriverDevice("cuda", "cuda", name, GIB, GIB, uuid=uuid, bus_id=bus, capability="8.9", driver="570", link=Link(4, lanes, 4, 16))


def test_torchs_numbers_are_matched_to_the_drivers_by_uuid(monkeypatch):
    cards = FakeDevices(count=2)
    cards.get_device_properties = lambda index: SimpleNamespace(is_integrated=0, uuid=f"id-{index}")
    use(monkeypatch, fake_torch("cuda", cuda=cards), card("x", uuid="id-1", lanes=4), card("y", uuid="id-0"))
    assert [(a.link, a.driver) for a in find_accelerators()] == [("PCIe 4.0 x16", "570"), ("PCIe 4.0 x4", "570")]


def test_by_pci_address_where_there_is_no_uuid(monkeypatch):
    cards = FakeDevices(count=1)
    cards.get_device_properties = lambda index: SimpleNamespace(is_integrated=0, pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
    use(monkeypatch, fake_torch("cuda", cuda=cards), card("x", bus="0000:0b:00.0", lanes=4), card("y", bus="0000:0a:00.0"))
    assert find_accelerators()[0].link == "PCIe 4.0 x16"


def test_equal_cards_in_unequal_slots_are_not_guessed_apart(monkeypatch):
    use(monkeypatch, fake_torch("cuda", cuda=FakeDevices()), card("Card 0"), card("Card 0", lanes=4))
    assert find_accelerators()[0].link == ""
    use(monkeypatch, fake_torch("cuda", cuda=FakeDevices()), card("Card 0"), card("Card 0"))
    assert find_accelerators()[0].link == "PCIe 4.0 x16"


def test_capability_and_features_from_torch(monkeypatch):
    cards = FakeDevices()
    cards.get_device_capability = lambda index: (8, 9)
    use(monkeypatch, fake_torch("cuda", cuda=cards))
    (found,) = find_accelerators()
    assert (found.capability, found.features) == ("8.9", {"bf16", "fp8", "int8"})


def test_rocm_capability_is_the_instruction_set(monkeypatch):
    cards = FakeDevices()
    cards.get_device_properties = lambda index: SimpleNamespace(is_integrated=0, gcnArchName="gfx942:sramecc+:xnack-")
    use(monkeypatch, fake_torch("cuda", hip="6.4", cuda=cards))
    (found,) = find_accelerators()
    assert (found.capability, "fp8" in found.features) == ("gfx942", True)


def test_old_torch_without_a_limit_for_metal_has_three_quarters(monkeypatch):
    torch = fake_torch("mps", mps=True, cuda=FakeDevices(available=False))
    del torch.mps.recommended_max_memory
    use(monkeypatch, torch)
    monkeypatch.setattr(accelerators.psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=20 * GIB))
    (found,) = find_accelerators()
    assert (found.total_bytes, found.free_bytes) == (24 * GIB, 22 * GIB)


def test_devices_of_a_mac_are_known_by_the_chip(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "read_nvml", list)
    monkeypatch.setattr(devices, "cpu_name", lambda: "Apple M4 Max")
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))
    (found,) = devices.find_devices(tmp_path, "darwin")
    assert (found.kind, found.name, found.total_bytes, found.unified) == ("mps", "Apple M4 Max", 48 * GIB, True)
    monkeypatch.setattr(devices, "cpu_name", lambda: "Intel(R) Core(TM) i9")
    assert devices.find_devices(tmp_path, "darwin") == []
