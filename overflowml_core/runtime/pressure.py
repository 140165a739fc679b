"""Says how full the memory of each device is, other programs included, and gives back what torch only caches of it. Knows no model."""

from __future__ import annotations

from typing import Any

import torch

from overflowml_core.reading import Reading

_BUILT_IN_KINDS = ("cuda", "xpu", "mps")


def read_devices() -> tuple[Reading, ...]:
    """The devices in whose memory this process holds something. Others have nothing to be given back, and to ask them could start them.

    Raises:
        RuntimeError: a driver failed.
    """
    return tuple(reading for kind in _kinds() for reading in (_read_mps() if kind == "mps" else _read(kind)))


def trim_devices() -> None:
    """Give back to the system what torch caches on devices without using it.

    Raises:
        RuntimeError: a driver failed, or something is being captured into a graph.
    """
    for kind in _kinds():
        torch.get_device_module(kind).empty_cache()


def _kinds() -> list[str]:
    """Kinds of devices that this process has started. A third-party one is what torch names as its accelerator."""
    current = torch.accelerator.current_accelerator()
    named = [] if current is None else [str(current.type)]
    return [kind for kind in dict.fromkeys([*named, *_BUILT_IN_KINDS]) if _has_started(kind)]


def _has_started(kind: str) -> bool:
    if kind == "mps":
        return bool(torch.backends.mps.is_available())
    if not hasattr(torch, kind):  # torch was built without it
        return False
    module = torch.get_device_module(kind)
    return bool(module.is_available()) and bool(getattr(module, "is_initialized", lambda: True)())


def _read(kind: str) -> list[Reading]:
    module: Any = torch.get_device_module(kind)
    readings = []
    for index in range(int(module.device_count())):
        held_bytes = int(module.memory_reserved(index))
        if held_bytes:
            free_bytes, total_bytes = (int(nbytes) for nbytes in module.mem_get_info(index))
            readings.append(Reading(f"{kind}:{index}", total_bytes, free_bytes, held_bytes))
    return readings


def _read_mps() -> list[Reading]:
    # What other programs take of it is RAM, and seen there.
    held_bytes, total_bytes = int(torch.mps.driver_allocated_memory()), int(torch.mps.recommended_max_memory())
    return [Reading("mps", total_bytes, max(0, total_bytes - held_bytes), held_bytes)] if held_bytes else []
