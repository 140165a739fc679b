"""What a phase runs, as rows of steps with seconds: one round for each kind of pass. Knows nothing of where weights are."""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.planner.cost import NOTHING, Costs, Spent
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.work import PassProfile

OUTSIDE = -1
"""Index of a step that belongs to no block."""

_MOST_CALLS = 8
"""Calls of a block in a pass that are told apart; more are taken as so many longer ones."""


@dataclass(frozen=True, slots=True)
class Part:
    """One component's pass.

    Attributes:
        component: its name.
        profile: what was profiled.
        steps: index of the block that each step calls (of its owner, where it is tied), or ``OUTSIDE``.
        seconds: what each step computes.
        spent: all of them together.
    """

    component: str
    profile: PassProfile
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    spent: Spent


@dataclass(frozen=True, slots=True)
class Round:
    """Passes of the components of a phase that happen equally often, one component after the other, so many times."""

    name: str
    count: int
    parts: tuple[Part, ...]

    @property
    def compute_s(self) -> float:
        """Seconds of computing in one round."""
        return sum(part.spent.total_s for part in self.parts)


def rounds_of(need: PhaseNeed, costs: Costs) -> tuple[Round, ...] | None:
    """The rounds of a phase, in the order in which they first happen.

    Components of a phase run interleaved (a ControlNet before its transformer, step by step): passes of the same name and count make one
    round. Rounds of different kinds follow one another (prefill, then tokens). Work outside blocks is put behind the last block; in a row
    of passes that is the same as before the first.

    Returns:
        None where a component was not profiled, or a rate is not known.
    """
    grouped: dict[tuple[str, int], list[Part]] = {}
    first = 0
    for component, profiles in zip(need.components, need.profiles, strict=True):
        if not profiles:
            return None
        for profile in profiles:
            part = _part(component.name, profile, need, range(first, first + len(component.blocks)), costs)
            if part is None:
                return None
            grouped.setdefault((profile.name, profile.count), []).append(part)
        first += len(component.blocks)
    return tuple(Round(name, count, tuple(parts)) for (name, count), parts in grouped.items() if count > 0)


def _part(component: str, profile: PassProfile, need: PhaseNeed, indices: range, costs: Costs) -> Part | None:
    steps: list[int] = []
    seconds: list[float] = []
    total_s = memory_s = 0.0
    works = profile.blocks
    if not profile.outside and not any(work.works for work in works):
        return None  # a profile of activations alone
    if works and len(works) != len(indices):
        return None
    for place, index in enumerate(indices):
        owner = need.owners[index]
        calls = min(works[place].calls, _MOST_CALLS) if works else 1
        spent = costs.seconds(works[place].works, need.weights[owner].conversion) if works else NOTHING
        if spent is None:
            return None
        if calls > 0:
            total_s += spent.total_s
            memory_s += spent.memory_s
            steps += [owner] * calls
            seconds += [spent.total_s / calls] * calls
    outside = costs.seconds(profile.outside)
    if outside is None:
        return None
    steps.append(OUTSIDE)
    seconds.append(outside.total_s)
    spent_all = Spent(total_s + outside.total_s, memory_s + outside.memory_s)
    return Part(component, profile, tuple(steps), tuple(seconds), spent_all)
