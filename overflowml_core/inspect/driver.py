"""A device as its driver sees it, and its link. Values only: who asks which driver is in ``nvml``, ``drm`` and ``devices``."""

from __future__ import annotations

from dataclasses import dataclass

UNIFIED_PERCENT = 75
"""Share of RAM that a GPU without memory of its own is counted with where the system names no limit: what Metal recommends on Macs with
more than 36 GB (``recommendedMaxWorkingSetSize``); smaller ones are granted about two thirds."""


@dataclass(frozen=True, slots=True)
class Link:
    """A PCI Express link.

    Attributes:
        generation: the highest that the device and its slot agree on; a copy raises the link to it.
        lanes: as linked now.
        current_generation: now; drivers lower it while the device idles, so that a low one says nothing about copies.
        most_lanes: what the device has; more than ``lanes`` in a slot that is narrower, or shared.
    """

    generation: int
    lanes: int
    current_generation: int
    most_lanes: int

    def __str__(self) -> str:
        return f"PCIe {self.generation}.0 x{self.lanes}"

    @property
    def narrow(self) -> bool:
        """Whether the slot gives the device fewer lanes than it has."""
        return self.lanes < self.most_lanes


@dataclass(frozen=True, slots=True)
class DriverDevice:
    """A device in its driver's words. Fields are as in :class:`~overflowml_core.machine.Accelerator`.

    Attributes:
        kind, backend: torch's device type, and what serves it.
        name: as the driver names it.
        total_bytes, free_bytes: of the device's memory, or of what it may take of the host's.
        unified: it computes in host memory.
        uuid: without the vendor's prefix; empty where there is none.
        bus_id: PCI address ("0000:01:00.0").
        capability: "8.9", "gfx1100".
        driver: its version.
        link: None where nobody said, or where there is none.
        wddm: Windows' display driver model holds its memory.
    """

    kind: str
    backend: str
    name: str
    total_bytes: int
    free_bytes: int
    unified: bool = False
    uuid: str = ""
    bus_id: str = ""
    capability: str = ""
    driver: str = ""
    link: Link | None = None
    wddm: bool = False


def unified_bytes(ram_bytes: int) -> int:
    """What a GPU without memory of its own is counted with, of so much RAM."""
    return ram_bytes * UNIFIED_PERCENT // 100
