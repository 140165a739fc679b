"""Known traps of hosts, drivers and formats, as data: when each applies, what it does to people, and what a plan does about it."""

from __future__ import annotations

from overflowml_core.traps.catalog import CATALOG, avoided, findings, objections, trap_named
from overflowml_core.traps.objection import ANYWHERE, Objection
from overflowml_core.traps.page import traps_page
from overflowml_core.traps.trap import Finding, Step, Surroundings, Trap

__all__ = [
    "ANYWHERE",
    "CATALOG",
    "Finding",
    "Objection",
    "Step",
    "Surroundings",
    "Trap",
    "avoided",
    "findings",
    "objections",
    "trap_named",
    "traps_page",
]
