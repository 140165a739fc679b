"""Prints a machine: what computes, what holds, how fast, and where the rates come from. Finds nothing out."""

from __future__ import annotations

from overflowml_core.cli.screen import Screen
from overflowml_core.machine import Accelerator, Machine, Rates
from overflowml_core.units import format_bytes

_FEATURES = ("bf16", "fp8", "int8", "nvfp4")
_SOURCES = {
    "measured": "measured on this machine",
    "datasheet": "from datasheets, not measured; 'overflowml calibrate' measures them",
    "assumed": "assumed, not measured; 'overflowml calibrate' measures them",
}


def show_machine(screen: Screen, machine: Machine) -> None:
    """Print all of a machine."""
    screen.heading("OverflowML Hardware Detection")
    screen.text(f"Accelerator: {machine.compute.backend or machine.compute.kind}")
    for accelerator in machine.accelerators:
        _show_accelerator(screen, accelerator)
    if not machine.accelerators:
        screen.paragraph("GPU: none; RAM under a budget computes and the disk holds the rest", hanging="  ")
    host = machine.host
    screen.paragraph(f"System RAM: {format_bytes(host.total_bytes)} ({format_bytes(host.available_bytes)} available)", hanging="  ")
    screen.text(f"Pinnable: {format_bytes(host.pinnable_bytes)}")
    named = f"{host.cpu_name}, " if host.cpu_name else ""
    isa = f", {' '.join(sorted(host.isa))}" if host.isa else ""
    screen.paragraph(f"CPU: {named}{host.core_count} cores{isa}", hanging="  ")
    if host.swap_bytes:
        screen.text(f"Swap: {format_bytes(host.swap_bytes)} free, never planned with")
    screen.text(f"Disk: {format_bytes(machine.disk_free_bytes)} free in the cache folder")
    if machine.environment:
        screen.text(f"Environment: {', '.join(sorted(machine.environment))}")
    show_rates(screen, machine)


def _show_accelerator(screen: Screen, accelerator: Accelerator) -> None:
    kind = "memory shared with the CPU" if accelerator.unified else "VRAM"
    memory = f"{format_bytes(accelerator.total_bytes)} {kind}, {format_bytes(accelerator.free_bytes)} free"
    screen.paragraph(f"GPU: {accelerator.name} ({memory})", hanging="  ")
    driver = f"driver {accelerator.driver}" if accelerator.driver else ""
    capability = f"capability {accelerator.capability}" if accelerator.capability else ""
    screen.paragraph(", ".join(filter(None, (accelerator.torch_name, capability, driver, accelerator.link))), "  ", "  ")
    if accelerator.features:
        words = [f"{name.upper()}: {'yes' if name in accelerator.features else 'no'}" for name in _FEATURES]
        screen.paragraph(" | ".join(words), "  ", "  ")


def show_rates(screen: Screen, machine: Machine) -> None:
    """Print the rates of every device that has its own."""
    owners = [(a.torch_name, machine.rates_of(i)) for i, a in enumerate(machine.accelerators)] or [("cpu", machine.rates)]
    if machine.accelerators and machine.cpu_rates is not None:
        owners.append(("cpu", machine.cpu_rates))
    for name, rates in owners:
        screen.paragraph(f"Rates of {name}: {_SOURCES.get(rates.source, rates.source)}", hanging="  ", style="bold")
        for line in rate_lines(rates):
            screen.paragraph(line, "  ", "  ")


def rate_lines(rates: Rates) -> list[str]:
    """What is known of rates, a line each."""
    pairs = (
        ("to the device", rates.h2d_bytes_per_s, rates.pageable_h2d_bytes_per_s),
        ("from the device", rates.d2h_bytes_per_s, rates.pageable_d2h_bytes_per_s),
    )
    lines = [
        f"{what}: {_rate(pinned)} pinned" + (f", {_rate(pageable)} pageable" if pageable else "")
        for what, pinned, pageable in pairs
        if pinned
    ]
    if rates.memory_bytes_per_s:
        lines.append(f"memory: {_rate(rates.memory_bytes_per_s)}")
    if rates.disk_bytes_per_s:
        lines.append(f"disk: {_rate(rates.disk_bytes_per_s)}")
    kinds: dict[str, list[str]] = {}
    for rate in rates.compute:
        kinds.setdefault(rate.kind, []).append(f"{rate.dtype} {rate.flop_per_s / 1e12:.3g}")
    lines += [f"{kind}: {', '.join(parts)} TFLOP/s" for kind, parts in kinds.items()]
    if rates.launch_s:
        lines.append(f"each operation: at least {rates.launch_s * 1e6:.3g} microseconds")
    if rates.op_seconds:
        lines.append(f"operations measured one by one: {len(rates.op_seconds)}")
    return lines


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
