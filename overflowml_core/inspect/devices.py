"""Joins what the drivers of this system report, whether or not the installed torch can use it. Knows nothing of torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import psutil

from overflowml_core.inspect.cpu import cpu_name
from overflowml_core.inspect.driver import DriverDevice, unified_bytes
from overflowml_core.inspect.drm import drm_devices
from overflowml_core.inspect.features import features_of
from overflowml_core.inspect.nvml import read_nvml
from overflowml_core.machine import Accelerator


def driver_devices(root: Path = Path("/"), platform: str = sys.platform) -> list[DriverDevice]:
    """Every device that a driver of this system reports: NVIDIA's through NVML, AMD's and Intel's through sysfs, Apple's by its chip.

    Takes no memory on a device. ``CUDA_VISIBLE_DEVICES`` and its like do not count here.

    Args:
        root: where /sys and /proc are looked for.
        platform: as ``sys.platform`` names it.
    """
    found = [_with_host_memory(device) for device in read_nvml()]
    if platform == "darwin":
        found += _apple()
    return [*found, *drm_devices(root)]


def find_devices(root: Path = Path("/"), platform: str = sys.platform) -> list[Accelerator]:
    """The same devices as accelerators, numbered by kind in the drivers' order. torch may see fewer, or number them differently.

    Args:
        root, platform: as for :func:`driver_devices`.
    """
    counts: dict[str, int] = {}
    found = []
    for device in driver_devices(root, platform):
        index = counts.get(device.kind, 0)
        counts[device.kind] = index + 1
        found.append(
            Accelerator(
                kind=device.kind,
                name=device.name,
                index=index,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
                unified=device.unified,
                backend=device.backend,
                features=features_of(device.backend, device.capability),
                capability=device.capability,
                driver=device.driver,
                link=str(device.link or ""),
            )
        )
    return found


def _with_host_memory(device: DriverDevice) -> DriverDevice:
    if device.total_bytes:
        return device
    ram = psutil.virtual_memory()
    total = unified_bytes(ram.total)
    return replace(device, total_bytes=total, free_bytes=min(total, ram.available))


def _apple() -> list[DriverDevice]:
    name = cpu_name()
    if not name.startswith("Apple"):  # an Intel Mac: its GPUs are of no use to current builds of torch
        return []
    return [_with_host_memory(DriverDevice("mps", "mps", name, 0, 0, unified=True))]
