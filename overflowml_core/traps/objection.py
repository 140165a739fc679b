"""What a plugin says against a plan."""

from __future__ import annotations

from dataclasses import dataclass

ANYWHERE = "*"
"""Second part of an exclusion that holds in every tier."""


@dataclass(frozen=True, slots=True)
class Objection:
    """A known trap that a plan would step into.

    Attributes:
        trap: its name.
        exclude: what planning must leave out: (format, tier) as in ``Limits.excluded``, (format, "*") for every tier, ("strategy", name),
            ("variant", name).
        reason: what would happen, in one sentence.
        remedy: what the plan does instead, in one sentence.
        evidence: where it is known from: "diffusers #13281", or a source file of a named version.
    """

    trap: str
    exclude: tuple[tuple[str, str], ...]
    reason: str
    remedy: str
    evidence: str
