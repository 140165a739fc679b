"""Asks all questions in their order, and puts the answers together. Reads nothing: facts in, report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from overflowml_core.doctor import hardware, packages, settings
from overflowml_core.doctor.facts import Facts
from overflowml_core.doctor.report import Check, Report
from overflowml_core.units import format_bytes

CHECKS: tuple[Callable[[Facts], Iterator[Check]], ...] = (
    packages.check_python,
    packages.check_torch,
    hardware.check_devices,
    packages.check_hosts,
    packages.check_torchao,
    packages.check_hub,
    hardware.check_ram,
    hardware.check_disk,
    hardware.check_calibration,
    settings.check_variables,
    settings.check_traps,
    settings.check_plugins,
    settings.check_activation,
)
"""Every question, in the order in which its answers are shown."""


def examine(facts: Facts) -> Report:
    """Judge an environment. Pure: the same facts give the same report."""
    return Report(_environment(facts), _hardware(facts), tuple(check for ask in CHECKS for check in ask(facts)))


def _environment(facts: Facts) -> tuple[tuple[str, str], ...]:
    rows = [("Python", facts.python), ("System", ", ".join(sorted(facts.machine.environment)) or "unknown")]
    if facts.torch is not None:
        rows.append(("Torch", facts.torch.version or facts.versions.get("torch", "unknown")))
    rows += [
        (name, facts.versions[name])
        for name in ("overflowml", "diffusers", "transformers", "accelerate", "torchao")
        if name in facts.versions
    ]
    driver = next((device.driver for device in facts.devices if device.driver), "")
    return (*rows, ("Driver", driver)) if driver else tuple(rows)


def _hardware(facts: Facts) -> tuple[tuple[str, str], ...]:
    machine = facts.machine
    rows = []
    for device in facts.devices:
        extras = [format_bytes(device.total_bytes)]
        extras += [f"compute capability {device.capability}"] if device.backend == "cuda" and device.capability else []
        rows.append(("GPU", f"{device.name} ({', '.join(extras)})"))
    # What torch names and no driver does: a device of a backend that brings its own.
    if not facts.devices:
        rows += [("GPU", f"{a.name} ({format_bytes(a.total_bytes)})") for a in machine.accelerators]
    cpu = f"{machine.host.cpu_name or 'unknown'}, {machine.host.core_count} cores"
    return (*rows, ("CPU", cpu), ("System RAM", format_bytes(facts.ram_bytes)), ("Disk free", format_bytes(machine.disk_free_bytes)))
