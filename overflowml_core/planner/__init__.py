"""The planner: decides where weights live. Standard library and floor 0 only; imports no torch."""

from __future__ import annotations

from overflowml_core.planner.outlook import what_if, with_outlook
from overflowml_core.planner.search import make_plan, smallest_budget_bytes
from overflowml_core.planner.timeline import Timeline, timeline_of

__all__ = ["Timeline", "make_plan", "smallest_budget_bytes", "timeline_of", "what_if", "with_outlook"]
