"""The catalog of known traps, and what they have to say about a plan and an environment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from overflowml_core.plan import Avoided, Plan
from overflowml_core.traps import conversion, hosts, streaming, system
from overflowml_core.traps.objection import Objection
from overflowml_core.traps.trap import Finding, Surroundings, Trap

if TYPE_CHECKING:
    from overflowml_core.facts import Machine, Network

CATALOG: tuple[Trap, ...] = (*streaming.TRAPS, *conversion.TRAPS, *system.TRAPS, *hosts.TRAPS)
"""All known traps, those of plans first."""


def objections(plan: Plan, network: Network, machine: Machine) -> list[Objection]:
    """What the catalog has against a plan; empty for a plan that may be carried out. Pure."""
    found = (trap.objection(plan, network, machine) for trap in CATALOG)
    return [objection for objection in found if objection is not None]


def avoided(plan: Plan, network: Network, machine: Machine, excluded: Iterable[Objection] = ()) -> tuple[Avoided, ...]:
    """What a plan steered around, each trap once: what was excluded on its way, and what was relevant by its numbers. Pure.

    Args:
        plan: the final one, to which nobody objects any more.
        network: what it was made for.
        machine: where it will run.
        excluded: objections to earlier plans, in the order in which they were made; a plugin's too.
    """
    found: dict[str, Avoided] = {}
    for objection in excluded:
        found.setdefault(objection.trap, Avoided(objection.trap, objection.reason, objection.remedy))
    for trap in CATALOG:
        if trap.relevance is None or trap.name in found:
            continue
        why = trap.relevance(plan, network, machine)
        if why:
            found[trap.name] = Avoided(trap.name, why, trap.what_we_do)
    return tuple(found.values())


def findings(surroundings: Surroundings) -> list[Finding]:
    """Which traps the environment is in. Pure."""
    found = (trap.look(surroundings) for trap in CATALOG if trap.look is not None)
    return [finding for finding in found if finding is not None]


def trap_named(name: str) -> Trap | None:
    """The trap of this name, None where the catalog has none."""
    return next((trap for trap in CATALOG if trap.name == name), None)
