"""Asks NVIDIA's management library for its devices: no CUDA context, no torch, no other process.

The library is taken through ``pynvml`` where that is installed, else through ctypes under the same function names, so that one reader
serves both, and a test's object with these names.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from overflowml_core.inspect.driver import DriverDevice, Link

_LOG = logging.getLogger(__name__)
_MOST_DEVICES = 64
_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE of nvml.h
_LINUX_NAMES = ("libnvidia-ml.so.1", "libnvidia-ml.so")
_WDDM = 0  # NVML_DRIVER_WDDM of nvml.h
_LATEST_PCIE = 16
_WIDEST_PCIE = 32


def read_nvml(library: Any = None) -> list[DriverDevice]:
    """NVIDIA's devices as the driver sees them, in PCI order; none without a driver.

    ``CUDA_VISIBLE_DEVICES`` does not count here. A driver that fails is logged as a warning.

    Args:
        library: an object with pynvml's functions; found by itself where None.
    """
    if library is None:
        library = open_nvml()
    if library is None:
        return []
    try:
        library.nvmlInit()
    except Exception as error:  # noqa: BLE001 -- pynvml raises one class per code; a library without a device or a driver is no fault
        _LOG.info("NVML: %s; no NVIDIA device is known to the driver", error)
        return []
    try:
        return _read(library)
    except Exception as error:  # noqa: BLE001 -- as above; a driver may be lost at any call
        _LOG.warning("NVML: the driver failed (%s); facts of NVIDIA devices are missing; check the driver with nvidia-smi", error)
        return []
    finally:
        _ask(library.nvmlShutdown)


def _read(library: Any) -> list[DriverDevice]:
    driver = _text(_ask(library.nvmlSystemGetDriverVersion))
    devices = []
    for index in range(min(int(library.nvmlDeviceGetCount()), _MOST_DEVICES)):
        try:
            devices.append(_describe(library, library.nvmlDeviceGetHandleByIndex(index), driver))
        except Exception as error:  # noqa: BLE001 -- as above; the other devices may be well
            _LOG.warning("NVML: device %d failed (%s) and is left out; check it with nvidia-smi", index, error)
    return devices


def _describe(library: Any, handle: Any, driver: str) -> DriverDevice:
    memory = _ask(library.nvmlDeviceGetMemoryInfo, handle)  # a device that computes in the host's memory (GB10) has none to report
    capability = _ask(library.nvmlDeviceGetCudaComputeCapability, handle)
    pci = _ask(library.nvmlDeviceGetPciInfo, handle)
    return DriverDevice(
        kind="cuda",
        backend="cuda",
        name=_text(library.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total) if memory is not None else 0,
        free_bytes=int(memory.free) if memory is not None else 0,
        unified=memory is None,
        uuid=_text(_ask(library.nvmlDeviceGetUUID, handle)).removeprefix("GPU-"),
        bus_id=bus_id(_text(pci.busId)) if pci is not None else "",
        capability="{}.{}".format(*capability) if capability is not None else "",
        driver=driver,
        link=_link(library, handle),
        wddm=sys.platform == "win32" and _driver_model(_ask(library.nvmlDeviceGetCurrentDriverModel, handle)) == _WDDM,
    )


def _link(library: Any, handle: Any) -> Link | None:
    lanes = _ask(library.nvmlDeviceGetCurrPcieLinkWidth, handle)
    most_lanes = _ask(library.nvmlDeviceGetMaxPcieLinkWidth, handle)
    generation = _ask(library.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    current = _ask(library.nvmlDeviceGetCurrPcieLinkGeneration, handle)
    if not isinstance(lanes, int) or not isinstance(generation, int) or not (0 < lanes <= _WIDEST_PCIE and 0 < generation <= _LATEST_PCIE):
        return None
    return Link(
        generation=generation,
        lanes=lanes,
        current_generation=current if isinstance(current, int) and 0 < current <= generation else generation,
        most_lanes=max(lanes, most_lanes) if isinstance(most_lanes, int) and most_lanes <= _WIDEST_PCIE else lanes,
    )


def _driver_model(answer: Any) -> Any:
    return answer[0] if isinstance(answer, (tuple, list)) and answer else answer


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """An answer, or None: every device lacks some of the functions."""
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001 -- pynvml raises one class per code
        return None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def bus_id(text: str) -> str:
    """A PCI address in one form ("0000:01:00.0"): NVML writes the domain with eight digits, sysfs with four."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}" if rest else ""


def open_nvml() -> Any:
    """pynvml, or the shared library behind the same names; None where neither is there."""
    if importlib.util.find_spec("pynvml") is not None:
        try:
            return importlib.import_module("pynvml")
        except Exception as error:  # noqa: BLE001 -- a foreign module of that name may raise anything
            _LOG.info("pynvml cannot be imported (%s); the library is asked without it", error)
    for name in _library_names():
        try:
            return Nvml(ctypes.CDLL(name))
        except (OSError, AttributeError):  # not there, or another library of that name
            continue
    return None


def _library_names() -> Sequence[str]:
    if sys.platform == "win32":
        # The documented places of nvml.dll: the system folder, and with older drivers NVSMI (NVML API reference, "known issues").
        return ("nvml.dll", os.path.join("C:\\Program Files", "NVIDIA Corporation", "NVSMI", "nvml.dll"))
    return _LINUX_NAMES if sys.platform.startswith("linux") else ()


class NvmlError(Exception):
    """A function of the library that returned another code than success."""


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Pci(ctypes.Structure):
    _fields_ = [
        ("busIdLegacy", ctypes.c_char * 16),
        *((name, ctypes.c_uint) for name in ("domain", "bus", "device", "pciDeviceId", "pciSubSystemId")),
        ("busId", ctypes.c_char * 32),
    ]


class Nvml:
    """The functions of nvml.h that are needed here, under the names that pynvml gives them. Each raises ``NvmlError`` for a code but 0.

    Raises:
        AttributeError: the library is not NVML.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._init = library.nvmlInit_v2
        self._count = library.nvmlDeviceGetCount_v2

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int
        code = function(*arguments)
        if code:
            raise NvmlError(f"{name} returned {code}")

    def _number(self, name: str, handle: Any) -> int:
        value = ctypes.c_uint()
        self._call(name, handle, ctypes.byref(value))
        return value.value

    def _string(self, name: str, *arguments: Any) -> bytes:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(name, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value

    def nvmlInit(self) -> None:
        self._call("nvmlInit_v2")

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return self._string("nvmlSystemGetDriverVersion")

    def nvmlDeviceGetCount(self) -> int:
        value = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(value))
        return value.value

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p) -> bytes:
        return self._string("nvmlDeviceGetName", handle)

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p) -> bytes:
        return self._string("nvmlDeviceGetUUID", handle)

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p) -> _Memory:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return memory

    def nvmlDeviceGetPciInfo(self, handle: ctypes.c_void_p) -> _Pci:
        pci = _Pci()
        self._call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
        return pci

    def nvmlDeviceGetCudaComputeCapability(self, handle: ctypes.c_void_p) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: ctypes.c_void_p) -> int:
        return self._number("nvmlDeviceGetCurrPcieLinkGeneration", handle)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: ctypes.c_void_p) -> int:
        return self._number("nvmlDeviceGetCurrPcieLinkWidth", handle)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: ctypes.c_void_p) -> int:
        return self._number("nvmlDeviceGetMaxPcieLinkGeneration", handle)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: ctypes.c_void_p) -> int:
        return self._number("nvmlDeviceGetMaxPcieLinkWidth", handle)

    def nvmlDeviceGetCurrentDriverModel(self, handle: ctypes.c_void_p) -> int:
        current, pending = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetDriverModel", handle, ctypes.byref(current), ctypes.byref(pending))
        return current.value
