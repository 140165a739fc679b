"""What a plan is made from and against: the arguments of a request, resolved once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.formats import Format
from overflowml_core.machine import Rates
from overflowml_core.plan import Budget
from overflowml_core.planner.cost import Conversion, Costs
from overflowml_core.planner.memory import resolve_budget
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.planner.residency import Residency
from overflowml_core.planner.rounds import Round, rounds_of
from overflowml_core.planner.stage import rates_of

RoundsKey = tuple[str, frozenset[tuple[str, str, Conversion]], str]


@dataclass(slots=True)
class Setting:
    """One request on one machine.

    Attributes:
        network, machine, workload, limits, formats, abilities: as they were asked.
        budget: the limits, resolved.
        budget_reasons: how, in words.
        rates: of the device that computes.
        costs: of computing on it.
        known_rounds: rounds of phases that were looked at, by phase, formats and variant.
        known_choices: residencies that were found, by the same.
    """

    network: Network
    machine: Machine
    workload: Workload
    limits: Limits
    formats: tuple[Format, ...]
    abilities: frozenset[str]
    budget: Budget
    budget_reasons: tuple[str, ...]
    rates: Rates
    costs: Costs
    known_rounds: dict[RoundsKey, tuple[Round, ...] | None] = field(default_factory=dict)
    known_choices: dict[RoundsKey, Residency | None] = field(default_factory=dict)

    @property
    def in_ram(self) -> bool:
        """Whether the compute tier is RAM, so that the disk is all that is outside of it."""
        return self.machine.compute.unified

    def rounds(self, need: PhaseNeed) -> tuple[Round, ...] | None:
        """What a phase runs, with seconds on the device; None where nobody knows."""
        key = key_of(need)
        if key not in self.known_rounds:
            self.known_rounds[key] = rounds_of(need, self.costs)
        return self.known_rounds[key]

    def on(self, machine: Machine, limits: Limits) -> Setting:
        """The same request on a part of the machine."""
        return setting_of(self.network, machine, self.workload, limits, self.formats, self.abilities)


def setting_of(
    network: Network, machine: Machine, workload: Workload, limits: Limits, formats: tuple[Format, ...], abilities: frozenset[str]
) -> Setting:
    """Resolve a request against its machine."""
    budget, reasons = resolve_budget(machine, limits)
    rates = rates_of(machine)
    return Setting(network, machine, workload, limits, formats, abilities, budget, reasons, rates, Costs(rates))


def on_cpu(setting: Setting) -> Setting:
    """The same request with the CPU as the compute device; the RAM that was granted is its budget."""
    machine = setting.machine
    rates = machine.cpu_rates or Rates(0.0, 0.0, machine.rates.disk_bytes_per_s, machine.rates.source)
    limits = replace(setting.limits, device_memory=setting.limits.host_memory, host_memory=None)
    return setting.on(replace(machine, accelerators=(), rates=rates, cpu_rates=None), limits)


def key_of(need: PhaseNeed) -> RoundsKey:
    """What tells a phase in its formats and variant from another. A format that is of a block's experts alone costs something else."""
    pairs = zip(need.blocks, need.weights, strict=True)
    formats = frozenset((name, weight.format, weight.conversion) for (name, _), weight in pairs if weight.format)
    return need.name, formats, need.variant
