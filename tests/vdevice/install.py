"""Makes torch know the device: once per process; later installs only reset the simulation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import module
from .config import DEVICE_NAME, Config
from .device import DEVICE, SimDevice
from .dispatch import fallback
from .internals import private, setup_backend
from .kernels import KERNELS
from .memory import forget_accesses
from .pinned import drop_registrations, is_pinned, pin_storage, pinned_copy

_libraries: list[torch.library.Library] = []  # a library unregisters its kernels when it dies


def install(config: Config | None = None) -> SimDevice:
    """Registers "vgpu" with torch if this process has not done so, and resets the simulation.

    A reset sets clock, budget, faults, log and peak; streams and live tensors stay valid, live tensors stay charged,
    registrations by `register_pinned` are dropped.

    Args:
        config: the machine to simulate; the default one if None.

    Returns:
        The process's one device.
    """
    with DEVICE.lock:
        if not _libraries:
            if hasattr(torch, DEVICE_NAME):
                raise RuntimeError(f"vdevice: torch.{DEVICE_NAME} exists: another copy of this package is installed")
            _register()
        DEVICE.reset(config or Config())
        forget_accesses()
        drop_registrations()
    return DEVICE


def _register() -> None:
    setup_backend(DEVICE_NAME, module)

    every_operator = torch.library.Library("_", "IMPL", "PrivateUse1")
    every_operator.fallback(fallback)
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name, kernel in KERNELS.items():
        kernels.impl(name, kernel)
    # torch asks the accelerator's C++ allocator who is pinned; a Python device has none
    host = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # replacing a kernel warns
        host.impl("_pin_memory", pinned_copy, allow_override=True)
        host.impl("is_pinned", is_pinned, allow_override=True)
    _libraries.extend([every_operator, autocast, kernels, host])

    _patch_factories()
    _patch_storage()
    _patch_accelerator()


def _patch_factories() -> None:
    """`pin_memory=True`: C++ would look for the accelerator's pinned allocator."""
    private("utils._device:_device_constructors")()  # it caches the functions by identity: before they are replaced
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "full",
        "ones",
        "rand",
        "randn",
        "tensor",
        "zeros",
        "zeros_like",
    ):
        setattr(torch, name, _with_pinning(getattr(torch, name)))


def _with_pinning(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        result = factory(*args, **kwargs)
        return pin_storage(result) if pin_memory else result

    return make


def _patch_storage() -> None:
    """`torch.UntypedStorage(n, device="vgpu")`, which deepcopy and load use: C++ crashes for want of an allocator."""
    original = torch.UntypedStorage.__new__

    def new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        if device is not None and torch.device(device).type == DEVICE_NAME:
            nbytes = int(args[0]) if args else 0
            return torch.empty(nbytes, dtype=torch.uint8, device=DEVICE_NAME).untyped_storage()
        if device is not None:
            kwargs["device"] = device
        storage: torch.UntypedStorage = original(cls, *args, **kwargs)
        return storage

    torch.UntypedStorage.__new__ = new


def _memory_stats(index: int) -> dict[str, Any]:
    use = {"all": {"current": DEVICE.allocated_bytes, "peak": DEVICE.peak_bytes}}
    return {"allocated_bytes": use, "reserved_bytes": use}


def _patch_accelerator() -> None:
    """torch.accelerator: its C++ side would ask a C++ allocator and C++ streams."""
    replacements: dict[str, Callable[..., Any]] = {
        "isAllocatorInitialized": lambda: True,
        "emptyCache": module.empty_cache,
        "getDeviceStats": _memory_stats,
        "resetPeakStats": module.reset_peak_memory_stats,
        "getMemoryInfo": module.mem_get_info,
        "getStream": module.current_stream,
        "setStream": module.set_stream,
        "synchronizeDevice": module.synchronize,
    }
    for name, replacement in replacements.items():
        if hasattr(torch._C, f"_accelerator_{name}"):  # not all of them are in every torch
            setattr(torch._C, f"_accelerator_{name}", replacement)
