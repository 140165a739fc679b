"""Notes what a trial of plans ran, beside the contest that decides; and times passes where there is no trial."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from overflowml_core.facts import Tier
from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import PassEstimate, PhasePlan, Plan
from overflowml_core.planner.trial import Contest

_LEAST_PASSES = 3
_MOST_MORE = 4
"""Plans that are run after the contest is decided."""
_CLEARLY = 0.97
"""Of the time of the plan as it was made, that another one must take at most to be kept in its place."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A plan that was run, what a pass was predicted to take under it, and what it took."""

    plan: Plan
    component: str
    predicted_pass_s: float | None
    measured_pass_s: float


class Surroundings(Protocol):
    """Knows other plans; see :class:`overflowml_core.cli.tuning.neighbours.Neighbourhood`."""

    def splits(self, plan: Plan) -> list[Plan]:
        """Others to run, the most promising first."""
        ...

    def with_phase(self, plan: Plan, phase: PhasePlan) -> Plan:
        """The plan with another phase."""
        ...


class WatchedContest:
    """A contest whose plans are noted, and that goes on with other plans once it is decided: it runs what promises to be faster, and
    whoever gave a minute wants the neighbours seen as well. See :class:`overflowml_core.runtime.trial.Contest`.

    At the end the fastest and the plan as it was made are run once more, one after the other: a machine that was busy with something else
    for a moment must not choose.

    Attributes:
        ran: in the order in which they ran.
        plan: the present one; the fastest when it is over.

    Args:
        contest: decides first.
        surroundings: knows the others.
    """

    def __init__(self, contest: Contest, surroundings: Surroundings) -> None:
        self._contest = contest
        self._surroundings = surroundings
        self._component = heaviest(contest.plan)
        self._made = contest.plan
        self._waiting: list[Plan] | None = None
        self._is_confirmed = False
        self.ran: list[Ran] = []
        self.plan = contest.plan

    @property
    def components(self) -> frozenset[str]:
        """Those whose passes are still to be measured."""
        return self._contest.components or (frozenset({self._component}) if self._waiting is not None else frozenset())

    @property
    def pass_s(self) -> float | None:
        """Seconds of a pass under the present plan."""
        return next((one.measured_pass_s for one in merged(self.ran) if what_of(one.plan) == what_of(self.plan)), None)

    @property
    def lessons(self) -> tuple[MeasuredPass, ...]:
        """What was measured."""
        return self._contest.lessons

    def hear(self, measured: MeasuredPass) -> Plan:
        """Take in a measured pass; the plan to run from now on."""
        expected = main_pass(self.plan, measured.component)
        self.ran.append(Ran(self.plan, measured.component, None if expected is None else expected.pass_s, measured.pass_s))
        if self._contest.components:
            self.plan = self._contest.hear(measured)
            if not self._contest.components and any(one.component == self._component for one in self.ran):
                seen = {what_of(one.plan) for one in self.ran}
                self._waiting = [plan for plan in self._surroundings.splits(self.plan) if what_of(plan) not in seen][:_MOST_MORE]
        if not self._contest.components:
            self._go_on()
        return self.plan

    def close(self) -> Plan:
        """Try nothing more; the best of those that were run."""
        if self._contest.components:
            self.plan = self._contest.close()
        self._waiting = None
        self._take_fastest()
        return self.plan

    def refuse(self, plan: Plan) -> None:
        """The plan named last could not be carried out, this one runs."""
        if self._contest.components:
            self._contest.refuse(plan)
        self._waiting, self.plan = None, plan

    def _go_on(self) -> None:
        if self._waiting == [] and not self._is_confirmed:
            self._is_confirmed = True
            best = fastest([one for one in self.ran if one.component == self._component])
            if what_of(best.plan) != what_of(self._made):
                self._waiting = [best.plan, self._made]
        if self._waiting:
            self.plan = self._waiting.pop(0)
        else:
            self._waiting = None
            self._take_fastest()

    def _take_fastest(self) -> None:
        own = [one for one in self.ran if one.component == self._component]
        phase = fastest(own).plan.phase_of(self._component) if own else None
        if phase is not None and phase != self.plan.phase_of(self._component):
            self.plan = self._surroundings.with_phase(self.plan, phase)


def merged(ran: Sequence[Ran]) -> list[Ran]:
    """Each plan once, with the least time that it took, in the order in which they first ran."""
    least: dict[tuple[str, str], Ran] = {}
    for one in ran:
        key = one.component, what_of(one.plan)
        known = least.get(key)
        least[key] = one if known is None else replace(known, measured_pass_s=min(known.measured_pass_s, one.measured_pass_s))
    return list(least.values())


def fastest(ran: Sequence[Ran]) -> Ran:
    """The fastest of at least one; the first of them where no other is clearly faster, for less is noise."""
    each = merged(ran)
    best = min(each, key=lambda one: one.measured_pass_s)
    return best if best.measured_pass_s < _CLEARLY * each[0].measured_pass_s else each[0]


class PassClock:
    """Times the passes of a module while it is open: from the beginning of one to that of the next of its kind. What a device does
    meanwhile counts, for whoever asks for the next token has seen the one before."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._times: dict[object, list[float]] = {}
        self._last: tuple[object, float] | None = None
        self._hook: Any = None

    def __enter__(self) -> PassClock:
        from overflowml_core.runtime.stopwatch import kind_of

        def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            kind, now_s = kind_of(args, kwargs), time.perf_counter()
            if self._last is not None and self._last[0] == kind:
                self._times.setdefault(kind, []).append(now_s - self._last[1])
            self._last = kind, now_s

        self._hook = self._module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        return self

    def __exit__(self, *raised: object) -> None:
        self._hook.remove()

    def pass_s(self) -> float | None:
        """Seconds of the kind of pass that came most often, the median of the second half of them: caches are warm then. None where fewer
        than three were seen."""
        most = max(self._times.values(), key=len, default=[])
        return statistics.median(most[len(most) // 2 :]) if len(most) >= _LEAST_PASSES else None


def main_pass(plan: Plan, component: str) -> PassEstimate | None:
    """The pass of a component that repeats: a token, not the prefill before it."""
    phase = plan.phase_of(component)
    own = [one for one in phase.passes if one.component == component] if phase is not None else []
    return max(own, key=lambda one: one.count, default=None)


def heaviest(plan: Plan) -> str:
    """The component with the most bytes in blocks and their experts."""
    held: dict[str, int] = {component: 0 for phase in plan.phases for component in phase.components}
    for place in plan.placements():
        held[place.component] += place.stored_bytes
    return max(held, key=lambda name: held[name])


def what_of(plan: Plan) -> str:
    """What tells a plan from its neighbours, in words."""
    from overflowml_core.units import format_bytes

    told = []
    for phase in plan.phases:
        count = len(phase.placements)
        kept = sum(place.tier is Tier.DEVICE for place in phase.placements)
        words = f"{kept} of {count} blocks resident" + (
            f", {phase.slot_count} slot{'s' * (phase.slot_count > 1)}" if phase.slot_count else ""
        )
        if phase.expert_cache_bytes:
            words += f", {format_bytes(phase.expert_cache_bytes)} of experts cached"
        told.append(f"{phase.name}: {words}" if len(plan.phases) > 1 else words)
    return "; ".join(told)
