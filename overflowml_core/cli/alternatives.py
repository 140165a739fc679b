"""The ways of running a model that a plan knows of, side by side: those that would run, the fastest first, and those that would not."""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.cli.words import speed_words
from overflowml_core.plan import Estimate, Plan, Rejected

RECOMMENDED = "<- recommended"
NOT_CARRIED_OUT = "(not carried out by this version)"


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
        (plan.strategy, plan.estimate, plan.quality, True, carried_out(plan), "")
    ]
    ways += [(r.strategy, r.estimate, r.quality, False, r.carried_out, r.reason) for r in plan.rejected if r.viable]
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


def carried_out(plan: Plan) -> bool:
    """Whether this version carries a plan out, and does not only forecast it."""
    from overflowml_core import session

    needs = set()
    if plan.formats:
        needs.add("formats")
    if any(p.experts_home is not None for p in plan.placements()):
        needs.add("experts")
    if len(plan.devices) > 1:
        needs.add("devices")
    if any(phase.variant for phase in plan.phases):
        needs.add("variants")
    return needs <= session.abilities_of(False)
