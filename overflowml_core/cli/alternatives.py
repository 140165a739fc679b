"""The ways of running a model that a plan knows of, side by side: those that would run, the fastest first, and those that would not."""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.cli.words import speed_words
from overflowml_core.plan import Estimate, Plan, Rejected

RECOMMENDED = "<- recommended"
NOT_CARRIED_OUT = "(not carried out by this version)"

_ABILITIES = {"experts": "experts", "devices": "devices", "cpu": "devices"}
"""What a kind of strategy needs beyond residency and streaming, as plugins and the session name it."""
_CONVERTED = frozenset({"fp8", "int8"})
"""Formats into which experts are converted."""
_VARIANTS = ("slicing", "tiling", "slicing+tiling")
"""What stands in a strategy's name and is no format."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way that would run within the limits.

    Attributes:
        strategy: its name.
        speed: a word for its time, by the rule of :func:`~overflowml_core.cli.words.speed_words`.
        estimate: what it would take.
        quality: what it does to the result.
        chosen: it is the plan.
        carried_out: this version can carry it out.
        reason: why it was not chosen; empty for the plan.
    """

    strategy: str
    speed: str
    estimate: Estimate | None
    quality: str
    chosen: bool
    carried_out: bool
    reason: str = ""

    @property
    def mark(self) -> str:
        """What stands behind its row."""
        return " ".join(filter(None, (RECOMMENDED if self.chosen else "", "" if self.carried_out else NOT_CARRIED_OUT)))


def alternatives(plan: Plan) -> tuple[Alternative, ...]:
    """The plan and all others that would run within the limits, the fastest first; those without a time are last."""
    ways: list[tuple[str, Estimate | None, str, bool, bool, str]] = [
        (plan.strategy, plan.estimate, plan.quality, True, carried_out(plan.strategy), "")
    ]
    ways += [
        (r.strategy, r.estimate, r.quality, False, r.carried_out and carried_out(r.strategy), r.reason) for r in plan.rejected if r.viable
    ]
    times = [None if estimate is None else estimate.total_s for _, estimate, *_ in ways]
    rows = [
        (seconds, Alternative(strategy, speed, estimate, quality, chosen, done, reason))
        for seconds, speed, (strategy, estimate, quality, chosen, done, reason) in zip(times, speed_words(times), ways, strict=True)
    ]
    rows.sort(key=lambda row: (row[0] is None, row[0] or 0.0, not row[1].chosen))
    return tuple(row for _, row in rows)


def refused(plan: Plan) -> tuple[Rejected, ...]:
    """The ways that would not run within the limits, or are not needed."""
    return tuple(r for r in plan.rejected if not r.viable)


def carried_out(strategy: str) -> bool:
    """Whether this version carries out a strategy of this name, and does not only forecast it."""
    from overflowml_core import session

    kind, *rest = strategy.split()
    needs = {_ABILITIES[kind]} if kind in _ABILITIES else set()
    needs |= {"variants" if word in _VARIANTS else "formats" for word in rest}
    if kind == "experts" and not _CONVERTED & set(rest):
        needs |= {"formats of experts"} if "formats" in needs else set()
    return needs <= session.abilities_of(False)
