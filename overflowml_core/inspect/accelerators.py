"""Finds the devices that torch computes on and asks each for its memory; drivers add what torch does not tell.

Imports torch only inside the functions, and only where a driver and the installed build could have a device in common.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil

from overflowml_core.inspect.cpu import cpu_name
from overflowml_core.inspect.devices import driver_devices
from overflowml_core.inspect.driver import DriverDevice, unified_bytes
from overflowml_core.inspect.features import features_of
from overflowml_core.inspect.torch_build import has_backend_extension, torch_build
from overflowml_core.machine import Accelerator

_LOG = logging.getLogger(__name__)
_BUILT_IN_KINDS = ("cuda", "xpu", "mps")


def find_accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """The accelerators that torch can use in this process, the one that torch itself prefers first; none without torch.

    torch is not imported, which takes two seconds, where it evidently has nothing to offer: no driver of a kind that the installed
    build knows. Asking a CUDA device for its memory creates this process's context on it, which takes some hundred MiB there; the
    free bytes are what is left after that. A driver that fails is logged as a warning and its devices are left out.

    Args:
        root: where /dev, /sys and /proc are looked for.
    """
    if "torch" not in sys.modules and not torch_may_have_devices(root):
        return []
    torch = _import_torch()
    if torch is None:
        return []
    found = [accelerator for kind in _kinds(torch) for accelerator in _devices(torch, kind)]
    return _with_driver_facts(torch, found, driver_devices(root)) if any(a.kind in _BUILT_IN_KINDS for a in found) else found


def torch_may_have_devices(root: Path = Path("/"), platform: str = sys.platform) -> bool:
    """Whether importing torch could reveal an accelerator, by cheap evidence: its build, device files, installed backends.

    Args:
        root: where /dev is looked for.
        platform: as ``sys.platform`` names it.
    """
    build = torch_build()
    if build is None:
        return False
    if not build.known or platform == "darwin" or has_backend_extension():
        return True
    if platform == "win32":  # no device files; a build without any of the three is for the CPU
        return bool(build.cuda or build.hip or build.xpu)
    has_nvidia = any((root / "dev").glob("nvidia[0-9]*")) or any((root / "dev" / name).exists() for name in ("nvidiactl", "nvmap", "dxg"))
    if build.cuda and has_nvidia:
        return True
    if build.hip and ((root / "dev/kfd").exists() or (root / "dev/dxg").exists()):
        return True
    return bool(build.xpu) and (any((root / "dev/dri").glob("renderD*")) or (root / "dev/dxg").exists())


def _with_driver_facts(torch: ModuleType, found: Sequence[Accelerator], devices: Sequence[DriverDevice]) -> list[Accelerator]:
    """Add driver version and link, which torch does not tell."""
    return [_joined(accelerator, _driver_of(torch, accelerator, devices)) for accelerator in found]


def _joined(accelerator: Accelerator, device: DriverDevice | None) -> Accelerator:
    if device is None:
        return accelerator
    capability = accelerator.capability or device.capability
    return replace(
        accelerator,
        capability=capability,
        features=features_of(accelerator.backend, capability),
        driver=device.driver,
        link="" if accelerator.unified else str(device.link or ""),
    )


def _driver_of(torch: ModuleType, accelerator: Accelerator, devices: Sequence[DriverDevice]) -> DriverDevice | None:
    """The same device in the driver's list. torch numbers devices in an order of its own, and may be shown a part of them only."""
    candidates = [device for device in devices if device.backend == accelerator.backend]
    properties = _properties(torch, accelerator)
    uuid = str(getattr(properties, "uuid", "") or "").lower().removeprefix("gpu-")
    place = _bus_id(properties)
    for device in candidates:
        if (uuid and device.uuid.lower() == uuid) or (place and device.bus_id.rpartition(".")[0] == place):
            return device
    same = [device for device in candidates if device.name == accelerator.name]
    # Equal cards in unequal slots cannot be told apart by name.
    return same[0] if same and all((d.link, d.driver) == (same[0].link, same[0].driver) for d in same) else None


def _properties(torch: ModuleType, accelerator: Accelerator) -> object | None:
    try:
        return torch.get_device_module(accelerator.kind).get_device_properties(accelerator.index)  # type: ignore[no-any-return]
    except Exception:  # noqa: BLE001 -- MPS has none, and drivers raise what they like; the facts are extras
        return None


def _bus_id(properties: object | None) -> str:
    found = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    numbers = [number for number in found if isinstance(number, int)]
    return "{:04x}:{:02x}:{:02x}".format(*numbers) if len(numbers) == 3 else ""


def _import_torch() -> ModuleType | None:
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        return None
    try:
        return importlib.import_module("torch")
    except Exception as error:  # noqa: BLE001 -- a broken installation raises whatever its loader raises (OSError, ImportError, ...)
        _LOG.warning("torch is installed but cannot be imported (%s): planning without an accelerator; reinstall torch", _line(error))
        return None


def _kinds(torch: ModuleType) -> list[str]:
    """Device types worth asking. A third-party one (PrivateUse1) is what torch names as its accelerator once it is loaded."""
    kinds: list[str] = []
    try:
        api = getattr(torch, "accelerator", None)  # from torch 2.6
        current = api.current_accelerator() if api is not None else None
        if current is not None:
            kinds.append(str(current.type))
    except Exception as error:  # noqa: BLE001 -- a third-party backend's code runs here
        _LOG.warning("torch cannot name its accelerator (%s): asking for %s only", _line(error), ", ".join(_BUILT_IN_KINDS))
    return list(dict.fromkeys([*kinds, *_BUILT_IN_KINDS]))


def _devices(torch: ModuleType, kind: str) -> list[Accelerator]:
    try:
        if not _is_available(torch, kind):
            return []
        count = 1 if kind == "mps" else int(torch.get_device_module(kind).device_count())
    except Exception as error:  # noqa: BLE001 -- drivers raise RuntimeError, AssertionError and what else they like
        _LOG.warning("%s: the driver failed (%s): planning without its devices; check the driver", kind, _line(error))
        return []
    found = []
    for index in range(count):
        try:
            found.append(_describe(torch, kind, index))
        except Exception as error:  # noqa: BLE001 -- as above; the other devices may be well
            _LOG.warning("%s:%d: the driver failed (%s): planning without this device; check the driver", kind, index, _line(error))
    return found


def _is_available(torch: ModuleType, kind: str) -> bool:
    if kind == "mps":
        return bool(torch.backends.mps.is_available())
    if not hasattr(torch, kind):  # an older torch, or one built without it
        return False
    return bool(torch.get_device_module(kind).is_available())


def _describe(torch: ModuleType, kind: str, index: int) -> Accelerator:
    if kind == "mps":
        return _describe_mps(torch)
    module = torch.get_device_module(kind)
    free, total = (int(nbytes) for nbytes in module.mem_get_info(index))
    backend = "rocm" if kind == "cuda" and torch.version.hip is not None else kind
    capability = _capability(module, backend, index)
    return Accelerator(
        kind=kind,
        name=_name(module, kind, index),
        index=index,
        total_bytes=total,
        free_bytes=min(total, free + _cached_bytes(module, index)),
        unified=_is_integrated(module, index),
        backend=backend,
        features=features_of(backend, capability),
        capability=capability,
    )


def _describe_mps(torch: ModuleType) -> Accelerator:
    # The recommended maximum is what Metal grants a process before it starts to swap, less than the machine's RAM.
    if hasattr(torch.mps, "recommended_max_memory"):
        total = int(torch.mps.recommended_max_memory())
    else:  # before torch 2.5
        total = unified_bytes(psutil.virtual_memory().total)
    chip = cpu_name() if sys.platform == "darwin" else ""
    return Accelerator(
        kind="mps",
        name=chip or "Apple GPU",
        index=0,
        total_bytes=total,
        free_bytes=max(0, total - int(torch.mps.driver_allocated_memory())),
        unified=True,
        backend="mps",
        features=features_of("mps", ""),
    )


def _capability(module: ModuleType, backend: str, index: int) -> str:
    """As the vendor counts it; empty where torch does not say."""
    if backend == "rocm" and hasattr(module, "get_device_properties"):
        return str(getattr(module.get_device_properties(index), "gcnArchName", "")).split(":", 1)[0]
    if backend == "cuda" and hasattr(module, "get_device_capability"):
        return "{}.{}".format(*module.get_device_capability(index))
    return ""


def _cached_bytes(module: ModuleType, index: int) -> int:
    """What torch's caching allocator holds without using it: the driver counts it as taken, but this process can have it."""
    if not (hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated")):
        return 0
    return max(0, int(module.memory_reserved(index)) - int(module.memory_allocated(index)))


def _name(module: ModuleType, kind: str, index: int) -> str:
    return str(module.get_device_name(index)) if hasattr(module, "get_device_name") else kind


def _is_integrated(module: ModuleType, index: int) -> bool:
    """Whether the device shares the host's memory (Jetson, DGX Spark, an APU), by the driver's own word; False where it says nothing."""
    if not hasattr(module, "get_device_properties"):
        return False
    properties = module.get_device_properties(index)
    return any(bool(getattr(properties, field, False)) for field in ("is_integrated", "is_integrated_gpu"))  # CUDA and ROCm; XPU


def _line(error: Exception) -> str:
    """An exception in one line; drivers like to write paragraphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
