"""The planner: decides where weights live. Standard library and floor 0 only; imports no torch."""

from __future__ import annotations

from overflowml_core.planner.search import make_plan, smallest_budget_bytes

__all__ = ["make_plan", "smallest_budget_bytes"]
