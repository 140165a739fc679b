"""Watches what batches really take of the device, where its allocator keeps a peak, and says how many items the next may have.

The peak is never reset, for it belongs to whoever measures with it. One that does not rise stems from something larger before, and is no
less than what the batch took, so that sizes derived from it err to the small side.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

_FILLED = 0.9
"""Share of the room that batches are let grow into; fragments of the allocator and longer prompts take some of the rest."""


class Watch(Protocol):
    """Told of each batch that was done."""

    def most(self, count: int) -> int | None:
        """How many items the next batch may have after one of ``count``, at least 1; None where there is nothing to say."""
        ...


class RoomWatch:
    """By what is free on the device that is torch's current one when it is made."""

    def __init__(self) -> None:
        self._module = _device_module(None)
        self._before_bytes = 0 if self._module is None else int(self._module.memory_allocated())

    def most(self, count: int) -> int | None:
        """See :class:`Watch`."""
        if self._module is None:
            return None
        each_bytes = (int(self._module.max_memory_allocated()) - self._before_bytes) // count
        if each_bytes <= 0:
            return None
        free_bytes, _ = self._module.mem_get_info()
        # What torch caches is there for the next batch, too.
        room_bytes = int(free_bytes) + int(self._module.memory_reserved()) - self._before_bytes
        return max(1, int(_FILLED * room_bytes) // each_bytes)


class BudgetWatch:
    """By a budget: a batch that takes more, though the device had room for it, is the last one of its size.

    Args:
        device: as torch names it ("cuda:0").
        budget_bytes: of the plan at work.
    """

    def __init__(self, device: str, budget_bytes: int) -> None:
        self._module, self._device, self._budget_bytes = _device_module(device.partition(":")[0]), device, budget_bytes
        self._peak_bytes = self._peak()

    def most(self, count: int) -> int | None:
        """See :class:`Watch`."""
        before_bytes, self._peak_bytes = self._peak_bytes, self._peak()
        return max(1, count // 2) if self._peak_bytes > max(before_bytes, self._budget_bytes) else None

    def _peak(self) -> int:
        return 0 if self._module is None else int(self._module.max_memory_allocated(self._device))


def _device_module(kind: str | None) -> Any:
    """torch's module of a kind of devices, or of its current accelerator; None where there is none that tells its peak."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    if kind is None:
        current = torch.accelerator.current_accelerator()
        kind = "cpu" if current is None else str(current.type)
    if kind in ("cpu", "mps"):
        return None
    module = torch.get_device_module(kind)
    told = ("memory_allocated", "max_memory_allocated", "memory_reserved", "mem_get_info")
    return module if module.is_available() and all(hasattr(module, name) for name in told) else None
