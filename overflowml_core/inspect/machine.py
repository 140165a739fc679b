"""Puts a machine together from what was found: accelerators, RAM, disk, and assumed rates between them. Measures nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from overflowml_core.facts import Accelerator, Machine, Rates
from overflowml_core.inspect.host import disk_free_bytes, host_memory

ASSUMED_LINK_BYTES_PER_S = 12e9
"""Host to device and back, pinned: PCIe 3.0 x16 reaches 11 to 12 GB/s (16 GB/s raw, less its encoding and packet headers),
PCIe 4.0 twice and 5.0 four times that. The slowest link still common is the cautious assumption: it makes a plan keep more
on the device, never promise more speed than there is. Where memory is unified, and on the CPU, nothing crosses a link and
the value is not used."""

ASSUMED_DISK_BYTES_PER_S = 1e9
"""Sequential direct reads: measured at 1.0 to 1.1 GB/s by the project on a cloud machine's disk. NVMe drives of a desktop
read at 3 to 14 GB/s, a SATA drive at 0.5."""


def detect_machine(accelerators: Sequence[Accelerator], folder: str | os.PathLike[str]) -> Machine:
    """The machine as a plan sees it, with rates that are assumed (``rates.source``).

    Args:
        accelerators: what ``find_accelerators`` or a plugin found, the one to compute on first.
        folder: where a packed copy of the weights would be written; it need not exist yet.
    """
    rates = Rates(
        h2d_bytes_per_s=ASSUMED_LINK_BYTES_PER_S,
        d2h_bytes_per_s=ASSUMED_LINK_BYTES_PER_S,
        disk_bytes_per_s=ASSUMED_DISK_BYTES_PER_S,
        source="assumed",
    )
    return Machine(accelerators=tuple(accelerators), host=host_memory(), rates=rates, disk_free_bytes=disk_free_bytes(folder))
