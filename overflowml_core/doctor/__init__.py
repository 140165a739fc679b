"""Examines an environment: what is installed, what hardware there is, what does not go together, and which command sets it right."""

from __future__ import annotations

from overflowml_core.doctor.examine import examine
from overflowml_core.doctor.facts import Facts, gather
from overflowml_core.doctor.report import Check, Level, Report

__all__ = ["Check", "Facts", "Level", "Report", "examine", "gather"]
