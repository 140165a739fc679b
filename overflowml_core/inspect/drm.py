"""Reads AMD's and Intel's devices from Linux' sysfs. Knows nothing of torch and of other systems."""

from __future__ import annotations

import re
from pathlib import Path

from overflowml_core.inspect.cpu import read_text
from overflowml_core.inspect.driver import DriverDevice, Link

_GENERATION_OF_GT_PER_S = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_AMD, _INTEL = 0x1002, 0x8086
_MOST_LANES = 32


def drm_devices(root: Path = Path("/")) -> list[DriverDevice]:
    """AMD's and Intel's devices with memory of their own, from Linux' sysfs (kernel: gpu/amdgpu/driver-misc, i915 and xe uAPI)."""
    found = []
    for card in sorted((root / "sys/class/drm").glob("card*")):
        if not re.fullmatch(r"card\d+", card.name):  # card0-DP-1 is a connector
            continue
        vendor = _hexadecimal(card / "device/vendor")
        if vendor == _AMD:
            found.append(_amd(card / "device", root))
        elif vendor == _INTEL:
            found.append(_intel(card))
    return [device for device in found if device is not None]


def _amd(device: Path, root: Path) -> DriverDevice | None:
    total, used = _decimal(device / "mem_info_vram_total"), _decimal(device / "mem_info_vram_used")
    if not total:
        return None
    address = device.resolve().name
    return DriverDevice(
        kind="cuda",
        backend="rocm",
        name=(read_text(device / "product_name") or "").strip() or f"AMD GPU {(read_text(device / 'device') or '').strip()}",
        total_bytes=total,
        free_bytes=max(0, total - (used or 0)),
        bus_id=address,
        capability=_gfx_of(address, root),
        driver=(read_text(root / "sys/module/amdgpu/version") or "").strip(),
        link=_sysfs_link(device),
    )


def _intel(card: Path) -> DriverDevice | None:
    candidates = (card / "lmem_total_bytes", card / "device/tile0/physical_vram_size_bytes")  # i915; xe
    total = next((size for path in candidates if (size := _size(path))), None)
    if not total:
        return None
    device = card / "device"
    name = f"Intel GPU {(read_text(device / 'device') or '').strip()}"
    return DriverDevice("xpu", "xpu", name, total, total, bus_id=device.resolve().name, link=_sysfs_link(device))


def _sysfs_link(device: Path) -> Link | None:
    """The link as the kernel's PCI core reports it, such as "16.0 GT/s PCIe" and "16"."""
    lanes, most_lanes = _decimal(device / "current_link_width"), _decimal(device / "max_link_width")
    generation, current = _generation(device / "max_link_speed"), _generation(device / "current_link_speed")
    if not lanes or not generation or lanes > _MOST_LANES:
        return None
    return Link(generation, lanes, min(current or generation, generation), max(lanes, min(most_lanes or lanes, _MOST_LANES)))


def _generation(path: Path) -> int:
    match = re.match(r"(\d{1,3}(?:\.\d)?) GT/s", read_text(path) or "")
    return _GENERATION_OF_GT_PER_S.get(float(match[1]), 0) if match else 0


def _gfx_of(address: str, root: Path) -> str:
    """The instruction set of the device at a PCI address, from the compute driver's list ("gfx1100"); empty where it is not listed."""
    place = re.fullmatch(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", address)
    if place is None:
        return ""
    # location_id is bus << 8 | device << 3 | function (Linux, kfd_topology.c); gfx_target_version is major * 10000 + minor * 100 + step.
    location = int(place[2], 16) << 8 | int(place[3], 16) << 3 | int(place[4])
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")):
        lines = (read_text(node / "properties") or "").splitlines()
        properties = dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
        version = properties.get("gfx_target_version", "0").strip()
        if properties.get("location_id", "").strip() == str(location) and version.isdigit() and int(version):
            major, rest = divmod(int(version), 10000)
            minor, step = divmod(rest, 100)
            return f"gfx{major}{minor}{step:x}"
    return ""


def _decimal(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _hexadecimal(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text) else None


def _size(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text, 0) if re.fullmatch(r"0x[0-9a-fA-F]{1,15}|[1-9]\d{0,18}", text) else None
