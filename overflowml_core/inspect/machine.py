"""Puts a machine together from what was found: accelerators, RAM, disk, and rates measured earlier, printed by vendors, or assumed.

Measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.inspect.calibration import apply_calibration
from overflowml_core.inspect.datasheet import LAUNCH_S, datasheet_of
from overflowml_core.inspect.devices import driver_devices
from overflowml_core.inspect.host import disk_free_bytes, host_memory
from overflowml_core.inspect.platforms import environment_words
from overflowml_core.machine import Accelerator, ComputeRate, HostMemory, Machine, Rates

ASSUMED_LINK_BYTES_PER_S = 12e9
"""Host to device and back, pinned: PCIe 3.0 x16 reaches 11 to 12 GB/s (16 GB/s raw, less its encoding and packet headers),
PCIe 4.0 twice and 5.0 four times that. The slowest link still common is the cautious assumption: it makes a plan keep more
on the device, never promise more speed than there is. Where memory is unified, and on the CPU, nothing crosses a link and
the value is not used."""

ASSUMED_DISK_BYTES_PER_S = 1e9
"""Sequential direct reads: measured at 1.0 to 1.1 GB/s by the project on a cloud machine's disk. NVMe drives of a desktop
read at 3 to 14 GB/s, a SATA drive at 0.5."""

ASSUMED_CLOCK_HZ = 2.5e9
"""What cores hold while all of them run vector code: server CPUs 2 to 3 GHz, desktops more."""
ASSUMED_FLOP_PER_CYCLE = {"avx512f": 64, "avx2": 32, "neon": 16, "": 8}
"""F32 operations of one core in a cycle: two fused multiply-adds of 16, 8 or 4 lanes (Intel and AMD optimization manuals, Arm Neoverse
software optimization guides); 8 for the vectors that every 64-bit x86 has."""
ASSUMED_CPU_SHARE = 0.6
"""Share of that which torch's matrix products reach on a few cores: 0.5 to 0.8."""
ASSUMED_BF16_FACTOR = {"amx_bf16": 4.0, "avx512_bf16": 2.0, "bf16": 2.0, "": 0.5}
"""BF16 products as a multiple of the F32 rate, by what the CPU has for them; without anything they are converted on the way."""
ASSUMED_F16_FACTOR = 0.25
"""The like for F16, which few CPUs multiply: a quarter was measured on a server CPU with AVX-512 and without its F16 part."""
ASSUMED_CORE_BYTES_PER_S = 15e9
ASSUMED_RAM_BYTES_PER_S = 45e9
"""Memory rate of one core, and of a desktop's two channels together (DDR5-5600: 46 to 63 GB/s)."""
ASSUMED_CPU_LAUNCH_S = 2e-6
"""What an operation on a few numbers takes in eager torch on the CPU: 1 to 3 microseconds."""


def detect_machine(accelerators: Sequence[Accelerator], folder: str | os.PathLike[str]) -> Machine:
    """The machine as a plan sees it. Its rates are what a calibration stored in the folder, else those of the accelerator's datasheet,
    else assumed; ``rates.source`` says which.

    Args:
        accelerators: what ``find_accelerators`` or a plugin found, the one to compute on first.
        folder: where calibrations lie and a packed copy of the weights would be written; it need not exist yet.
    """
    host = host_memory()
    rated = tuple(_with_rates(accelerator) for accelerator in accelerators)
    machine = Machine(
        accelerators=rated,
        host=host,
        rates=assumed_rates(host, rated),
        disk_free_bytes=disk_free_bytes(folder),
        environment=environment_words(devices=driver_devices()) if rated else environment_words(),
        cpu_rates=assumed_cpu_rates(host) if rated else None,
    )
    return apply_calibration(machine, folder)


def assumed_rates(host: HostMemory, accelerators: Sequence[Accelerator]) -> Rates:
    """Rates of the compute device where nothing was measured: its own where it has some, cautious ones else, the CPU's without one."""
    if not accelerators:
        return assumed_cpu_rates(host)
    own = accelerators[0].rates
    return own if own is not None else _unknown_rates(accelerators[0])


def assumed_cpu_rates(host: HostMemory, disk_bytes_per_s: float = ASSUMED_DISK_BYTES_PER_S) -> Rates:
    """What a CPU may do, by its cores and vector extensions.

    Args:
        host: cores and extensions.
        disk_bytes_per_s: rate of the disk.
    """
    width = next(word for word in ASSUMED_FLOP_PER_CYCLE if word in host.isa or not word)
    f32 = host.core_count * ASSUMED_CLOCK_HZ * ASSUMED_FLOP_PER_CYCLE[width] * ASSUMED_CPU_SHARE
    bf16 = f32 * ASSUMED_BF16_FACTOR[next(word for word in ASSUMED_BF16_FACTOR if word in host.isa or not word)]
    memory = min(host.core_count * ASSUMED_CORE_BYTES_PER_S, ASSUMED_RAM_BYTES_PER_S)
    return Rates(
        h2d_bytes_per_s=memory / 2,  # a copy reads and writes
        d2h_bytes_per_s=memory / 2,
        disk_bytes_per_s=disk_bytes_per_s,
        source="assumed",
        pageable_h2d_bytes_per_s=memory / 2,
        pageable_d2h_bytes_per_s=memory / 2,
        memory_bytes_per_s=memory,
        compute=(
            ComputeRate("matmul", "F32", f32),
            ComputeRate("matmul", "BF16", bf16),
            ComputeRate("matmul", "F16", f32 * ASSUMED_F16_FACTOR),
        ),
        launch_s=ASSUMED_CPU_LAUNCH_S,
    )


def _with_rates(accelerator: Accelerator) -> Accelerator:
    """Give an accelerator that brought none the rates of its datasheet, over the link that it has now."""
    if accelerator.rates is not None:
        return accelerator
    sheet = datasheet_of(accelerator.name, accelerator.total_bytes)
    if sheet is None or sheet.kind != accelerator.kind:
        return accelerator
    rates = sheet.rates(ASSUMED_DISK_BYTES_PER_S, accelerator.link)
    return replace(
        accelerator,
        rates=rates,
        features=accelerator.features or sheet.features,
        capability=accelerator.capability or sheet.capability,
    )


def _unknown_rates(accelerator: Accelerator) -> Rates:
    """Cautious links; how fast it computes is unknown, and 0 says so."""
    return Rates(
        h2d_bytes_per_s=ASSUMED_LINK_BYTES_PER_S,
        d2h_bytes_per_s=ASSUMED_LINK_BYTES_PER_S,
        disk_bytes_per_s=ASSUMED_DISK_BYTES_PER_S,
        source="assumed",
        launch_s=LAUNCH_S.get(accelerator.backend, 1e-5),
    )
