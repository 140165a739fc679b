"""Finds the devices that compute and asks each for its memory. Imports torch only inside the functions, where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType

from overflowml_core.facts import Accelerator

_LOG = logging.getLogger(__name__)
_BUILT_IN_KINDS = ("cuda", "xpu", "mps")


def find_accelerators() -> list[Accelerator]:
    """The accelerators that torch can use in this process, the one that torch itself prefers first; none without torch.

    Asking a CUDA device for its memory creates this process's context on it, which takes some hundred MiB there; the free
    bytes are what is left after that. A driver that fails is logged as a warning and its devices are left out.
    """
    torch = _import_torch()
    if torch is None:
        return []
    return [accelerator for kind in _kinds(torch) for accelerator in _devices(torch, kind)]


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
    return Accelerator(
        kind=kind,
        name=_name(module, kind, index),
        index=index,
        total_bytes=total,
        free_bytes=min(total, free + _cached_bytes(module, index)),
        unified=_is_integrated(module, index),
        backend=backend,
    )


def _describe_mps(torch: ModuleType) -> Accelerator:
    # The recommended maximum is what Metal grants a process before it starts to swap, less than the machine's RAM.
    total = int(torch.mps.recommended_max_memory())
    free = max(0, total - int(torch.mps.driver_allocated_memory()))
    return Accelerator(kind="mps", name="Apple GPU", index=0, total_bytes=total, free_bytes=free, unified=True, backend="mps")


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
