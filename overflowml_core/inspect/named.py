"""Makes a machine out of names ("RTX 4090", "2x RTX 3060", "M4 Max 128GB") and the host it would stand in. Measures nothing."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect.datasheet import Datasheet, find_named
from overflowml_core.inspect.driver import unified_bytes
from overflowml_core.inspect.host import disk_free_bytes, host_memory, pinnable_bytes
from overflowml_core.inspect.machine import ASSUMED_DISK_BYTES_PER_S, assumed_cpu_rates, assumed_rates
from overflowml_core.inspect.platforms import environment_words
from overflowml_core.machine import Accelerator, HostMemory, Machine

CONTEXT_BYTES = 512 * 2**20
"""What a process's own context takes of a device before the first tensor: 0.4 to 0.6 GiB with CUDA and ROCm. A detected device reports free
bytes after that, so that a named one has all of its memory free but this."""

_MOST_ACCELERATORS = 64
_LONGEST_TEXT = 2000


def named_machine(gpu: str, *, ram_bytes: int | None = None, base: Machine | None = None) -> Machine:
    """The machine that these accelerators would make of a host.

    A GPU of its own memory has all of it free but ``CONTEXT_BYTES``; one that computes in RAM has three quarters of it
    (:data:`~overflowml_core.inspect.driver.UNIFIED_PERCENT`), and RAM is what was named with it. RAM that is named is free as a whole.

    Args:
        gpu: names separated by commas, each with a count before it where there are several ("RTX 4090, 2x RTX 3060"); the first
            runs the model.
        ram_bytes: RAM of the host, in bytes; the base's where None.
        base: gives RAM, cores, disk and platform; this machine where None.

    Raises:
        UnknownAccelerator: a name that no accelerator has, or several.
        OverflowmlError: a list without names, or of more than 64.
    """
    sheets = _sheets(gpu)
    host_base = base if base is not None else _this_machine()
    first = sheets[0]
    host = _host(host_base.host, ram_bytes, first)
    disk = host_base.rates.disk_bytes_per_s or ASSUMED_DISK_BYTES_PER_S
    counts: dict[str, int] = {}
    accelerators = []
    for sheet in sheets:
        index = counts.get(sheet.kind, 0)
        counts[sheet.kind] = index + 1
        accelerators.append(_accelerator(sheet, index, disk, host))
    is_mac = first.backend == "mps"
    cpu_rates = host_base.cpu_rates if host_base.accelerators else host_base.rates
    return Machine(
        accelerators=tuple(accelerators),
        host=host,
        rates=first.rates(disk),
        disk_free_bytes=host_base.disk_free_bytes,
        environment=frozenset({"macos"}) if is_mac else host_base.environment,
        cpu_rates=assumed_cpu_rates(host, disk) if is_mac or cpu_rates is None else cpu_rates,
        named=True,
    )


def _sheets(gpu: str) -> list[Datasheet]:
    found: list[Datasheet] = []
    for part in gpu[:_LONGEST_TEXT].split(","):
        match = re.fullmatch(r"\s*(?:(\d{1,6})\s*[x\u00d7*]\s+)?(.*?)\s*", part, re.S)
        if match is None or not match[2]:
            raise OverflowmlError(f"gpu={gpu[:120]!r}: an empty name in the list; write names such as 'RTX 4090, 2x RTX 3060'")
        count = int(match[1] or 1)
        if not 0 < count <= _MOST_ACCELERATORS - len(found):
            raise OverflowmlError(f"gpu={gpu[:120]!r}: {count} times {match[2]!r}; a machine has 1 to {_MOST_ACCELERATORS} accelerators")
        found += [find_named(match[2])] * count
    return found


def _accelerator(sheet: Datasheet, index: int, disk_bytes_per_s: float, host: HostMemory) -> Accelerator:
    if sheet.unified:
        total = unified_bytes(host.total_bytes)
        free = min(total, host.available_bytes)
    else:
        total = sheet.memory_bytes
        free = max(0, total - CONTEXT_BYTES)
    return Accelerator(
        kind=sheet.kind,
        name=sheet.name,
        index=index,
        total_bytes=total,
        free_bytes=free,
        unified=sheet.unified,
        backend=sheet.backend,
        rates=sheet.rates(disk_bytes_per_s),
        features=sheet.features,
        capability=sheet.capability,
        link="" if sheet.unified else sheet.link,
    )


def _host(base: HostMemory, ram_bytes: int | None, first: Datasheet) -> HostMemory:
    if first.unified and ram_bytes is None:
        ram_bytes = first.memory_bytes
    host = base
    if ram_bytes is not None:
        host = replace(base, total_bytes=ram_bytes, available_bytes=ram_bytes, pinnable_bytes=pinnable_bytes(ram_bytes, ram_bytes))
    if first.backend == "mps":
        host = replace(host, isa=frozenset({"neon"}), cpu_name=first.name.partition(" (")[0], swap_bytes=0)
    return host


def _this_machine() -> Machine:
    host = host_memory()
    rates = assumed_rates(host, ())
    return Machine((), host, rates, disk_free_bytes(os.curdir), environment_words(), None)
