"""Known traps of hosts, drivers and formats, as data: when each applies, what it does to people, and what a plan does about it."""

from __future__ import annotations

from overflowml_core.traps.objection import Objection

__all__ = ["Objection"]
