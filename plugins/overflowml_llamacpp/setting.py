"""What a model shall run on: bytes of the device and of RAM, and how fast both are read. Measures nothing.

Budget and rates are those of every plan: the planner's budget, which keeps a part of what is free now for drivers, and rates measured on
the machine, printed by vendors, or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.facts import Limits
from overflowml_core.inspect.named import CONTEXT_BYTES
from overflowml_core.machine import Machine, Rates
from overflowml_core.planner.memory import resolve_budget
from overflowml_core.units import format_bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a model shall run.

    Attributes:
        device_bytes: what llama.cpp may take of the device; 0 without one.
        context_bytes: of these, what its process takes before the first tensor; 0 where that is off the budget already.
        host_bytes: RAM that can be taken.
        device_rates: None where nobody knows them, or without a device.
        cpu_rates: of the CPU and its disk.
        reasons: where the numbers are from.
        warnings: what is not known.
    """

    device_bytes: int
    context_bytes: int
    host_bytes: int
    device_rates: Rates | None
    cpu_rates: Rates
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def setting_of(machine: Machine, budget_bytes: int | None) -> Setting:
    """What there is to run on, or what the user grants of it.

    Args:
        machine: detected, named or read from a file.
        budget_bytes: asked for with ``--vram-budget``; None takes what is free.
    """
    host = machine.host
    cpu_rates = machine.cpu_rates if machine.accelerators and machine.cpu_rates is not None else machine.rates
    if machine.accelerators:
        budget, reasons = resolve_budget(machine, Limits(device_memory=budget_bytes))
        several = (
            (f"{len(machine.accelerators)} accelerators: the first one is planned with, and -sm none keeps llama-server to it",)
            if len(machine.accelerators) > 1
            else ()
        )
        context = 0 if machine.named or machine.compute.unified else CONTEXT_BYTES
        rates = machine.rates_of(0)
        return Setting(budget.device_bytes, context, host.available_bytes, rates, cpu_rates, reasons[:1], several)
    if budget_bytes is not None:
        return Setting(
            device_bytes=budget_bytes,
            context_bytes=CONTEXT_BYTES,
            host_bytes=host.available_bytes,
            device_rates=None,
            cpu_rates=cpu_rates,
            reasons=(f"{format_bytes(budget_bytes)}, as asked; no accelerator is found here",),
            warnings=("the accelerator is not known, and so is how fast it is; name it with --gpu for a prediction",),
        )
    why = "no accelerator is found here, so the CPU computes; plan for one with --vram-budget 12GB, or --gpu 'RTX 4090'"
    return Setting(0, 0, host.available_bytes, None, cpu_rates, (why,))
