"""Every private name of torch that the virtual accelerator stands on, looked up in one place with a clear error."""

from __future__ import annotations

import importlib
from functools import reduce
from typing import Any

import torch

TESTED_WITH = "2.13"

PRIVATE_USE_1 = 20  # c10::DeviceType::PrivateUse1, as torch.Stream wants it
DLPACK_EXT_DEV = 12  # kDLExtDev, which torch maps to PrivateUse1


def private(path: str) -> Any:
    """The object at `path` under torch, e.g. "_C._from_dlpack" or "utils._device:_device_constructors".

    What is before a colon is a module, which torch may not have loaded by itself.
    """
    module, _, name = path.rpartition(":")
    try:
        root = importlib.import_module(f"torch.{module}") if module else torch
        return reduce(getattr, name.split("."), root)
    except (AttributeError, ImportError) as error:
        moved = path.replace(":", ".")
        message = f"vdevice: torch.{moved} moved; tested with torch {TESTED_WITH}, this is {torch.__version__}"
        raise RuntimeError(message) from error


def setup_backend(name: str, module: object) -> None:
    """Registers the device name, its torch.<name> module and the guards C++ expects of a device."""
    private("utils.backend_registration:_setup_privateuseone_for_python_backend")(name, backend_module=module)


def cpu_keys() -> Any:
    """The key set that sends an operator to its CPU kernel; view kernels never look at the device."""
    return private("_C.DispatchKeySet")(private("_C.DispatchKey").CPU)


def flop_formulas() -> dict[Any, Any]:
    """FLOPs of an operator's arguments, by operator."""
    formulas: dict[Any, Any] = private("utils.flop_counter:flop_registry")
    return formulas
