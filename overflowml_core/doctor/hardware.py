"""Judges the machine: devices and their links, RAM and its limits, the disk, and whether its rates are known."""

from __future__ import annotations

from collections.abc import Iterator

from overflowml_core.doctor.facts import Facts, built_backends
from overflowml_core.doctor.report import Check
from overflowml_core.units import format_bytes

_GIB = 2**30
SMALL_DISK_BYTES = 20 * _GIB
"""Less free space than this is worth a word: a packed copy of FLUX.1-dev's transformer takes 22 GiB, and the other parts of a plan for the
disk come on top."""
LITTLE_RAM_BYTES = 2 * _GIB
"""Less available RAM than this is worth a word: Python, torch and a host alone take about 1 GiB."""
TAKEN_PERCENT = 50
"""A device of whose memory more than this is taken by others is worth a word."""


def check_devices(facts: Facts) -> Iterator[Check]:
    """Each device: its memory, and the link behind which it sits."""
    accelerators = facts.machine.accelerators
    if not accelerators and not facts.devices:
        yield Check("device", "PASS", "no accelerator: RAM under a budget computes, the disk holds the rest")
    unused = next((device for device in facts.devices if device.kind not in {a.kind for a in accelerators}), None)
    # A torch that is not built for it is said elsewhere.
    if unused is not None and unused.backend in built_backends(facts):
        fix = f"python -c \"import torch; torch.zeros(1, device='{unused.kind}')\" (shows torch's own reason)"
        yield Check("device", "FAIL", f"{unused.name} is there, and torch, built for it, cannot use it", fix)
    for accelerator in accelerators:
        free, total = accelerator.free_bytes, accelerator.total_bytes
        shown = f"{accelerator.name}: {format_bytes(free)} free of {format_bytes(total)}"
        if not accelerator.unified and free * 100 < total * (100 - TAKEN_PERCENT):
            yield Check("device", "WARN", f"{shown}: other programs hold the rest", "end them (nvidia-smi, rocm-smi or xpu-smi lists them)")
        else:
            yield Check("device", "PASS", shown)
    for device in facts.devices:
        link = device.link
        if link is None:
            continue
        if link.narrow:
            text = f"{device.name} is linked by {link.lanes} of its {link.most_lanes} PCIe lanes: streaming is that much slower"
            yield Check(
                "link", "WARN", text, "move it into the slot next to the CPU, and look in the firmware's settings for lanes shared with M.2"
            )
        elif link.current_generation < link.generation:
            now = f"it runs at generation {link.current_generation} now, which is normal while it idles"
            yield Check("link", "PASS", f"{device.name}: {link}; {now}")
        else:
            yield Check("link", "PASS", f"{device.name}: {link}")


def check_ram(facts: Facts) -> Iterator[Check]:
    """RAM as this process may use it, and what limits it."""
    host = facts.machine.host
    available, total, pinnable = map(format_bytes, (host.available_bytes, host.total_bytes, host.pinnable_bytes))
    shown = f"RAM: {available} available of {total}, {pinnable} pinnable"
    if host.available_bytes < LITTLE_RAM_BYTES:
        yield Check("ram", "WARN", f"{shown}: too little for torch and a host", "end other programs")
    else:
        yield Check("ram", "PASS", shown)
    yield from _check_container(facts)
    yield from _check_wsl(facts)
    if not host.swap_bytes and "container" not in facts.machine.environment:
        yield Check("swap", "PASS", "no free swap; plans never count on it")


def _check_container(facts: Facts) -> Iterator[Check]:
    host = facts.machine.host
    if host.total_bytes >= facts.ram_bytes * 0.98:  # the kernel keeps a little of what a limit may name
        return
    text = f"this process may use {format_bytes(host.total_bytes)} of the machine's {format_bytes(facts.ram_bytes)} of RAM"
    inside = "container" in facts.machine.environment
    fix = "start the container with a higher --memory" if inside else "raise the memory limit of its control group (systemd: MemoryMax=)"
    yield Check("memory-limit", "WARN", f"{text}, and is killed beyond that", fix)


def _check_wsl(facts: Facts) -> Iterator[Check]:
    if "wsl2" not in facts.machine.environment:
        return
    needed = max((device.total_bytes for device in facts.devices), default=0)
    text = f"WSL2 has {format_bytes(facts.ram_bytes)} of RAM, by default half of what Windows has"
    if facts.ram_bytes < 2 * needed:
        fix = "in .wslconfig in your Windows profile, under [wsl2], set memory= to more, then run: wsl --shutdown"
        yield Check("wsl2-memory", "WARN", f"{text}: little to stream from to {format_bytes(needed)} of device memory", fix)
    else:
        yield Check("wsl2-memory", "PASS", text)


def check_disk(facts: Facts) -> Iterator[Check]:
    """The folder into which weights, profiles and calibrations are written."""
    if facts.cache_problem:
        fix = "export OVERFLOWML_CACHE=FOLDER, with a folder of your own"
        yield Check("cache-folder", "FAIL", f"the cache folder {facts.cache_folder} cannot be written ({facts.cache_problem})", fix)
        return
    free = facts.machine.disk_free_bytes
    shown = f"{format_bytes(free)} free in the cache folder {facts.cache_folder}"
    if free < SMALL_DISK_BYTES:
        fix = "make room there, or export OVERFLOWML_CACHE=FOLDER, with a folder on a larger disk"
        yield Check("disk", "WARN", f"{shown}: little for a packed copy of weights", fix)
    else:
        yield Check("disk", "PASS", shown)


def check_calibration(facts: Facts) -> Iterator[Check]:
    """Whether times rest on rates of this machine."""
    rates = facts.machine.rates
    if rates.measured:
        yield Check("calibration", "PASS", "rates of this machine are measured")
    elif facts.other_calibrations:
        text = "the calibration was made with other hardware, drivers or another torch: times of plans rest on assumed rates"
        yield Check("calibration", "WARN", text, "overflowml calibrate")
    else:
        words = {"datasheet": "datasheets"}.get(rates.source, f"{rates.source} rates")
        yield Check("calibration", "WARN", f"this machine was never measured: times of plans rest on {words}", "overflowml calibrate")
