"""Policies for a cache of experts, led through a recorded trace, beside the best that any policy can do. Holds no weights.

Note [what counts]. All experts that a bank asks for in a pass are looked for before any of them is brought in. What is asked for is brought
in and takes the place of another, which is none of those that the pass asks for, as long as there are others. Only hits of decoding
passes count; prefills go through the cache as well.

Note [optimum]. After each step the best policy keeps, of all that it then could, what is asked for next the soonest (L. Belady, "A study of
replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966). Here it may also keep nothing of what was just
brought in, and what is next asked for by a pass that does not count is worth nothing to it: so it is a bound for every policy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from moe_trace import Step, Trace


@dataclass(frozen=True)
class Found:
    """What a cache found: experts that decoding passes asked for, and how many of them were there."""

    requests: int
    hits: int

    @property
    def rate(self) -> float:
        """Share of them that were there."""
        return self.hits / self.requests if self.requests else 0.0


class Policy(Protocol):
    """Says who leaves."""

    def saw(self, step: Step) -> None:
        """A bank asks for experts; they count as used now."""

    def coldest(self, cached: Collection[int]) -> int:
        """Of these, who leaves."""


class Scored:
    """A policy by a number for each expert, cached or not."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}

    def coldest(self, cached: Collection[int]) -> int:
        """The one with the lowest score; of several, the one with the lowest number."""
        return min(cached, key=lambda expert: (self.scores.get(expert, -math.inf), expert))


class LRU(Scored):
    """The least recently used leaves."""

    def saw(self, step: Step) -> None:
        """Its score is the present time."""
        self.scores.update(dict.fromkeys(step.given, step.now))


class LRU2(Scored):
    """The one leaves whose last use but one is the longest ago (O'Neil et al., SIGMOD 1993)."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, int] = {}

    def saw(self, step: Step) -> None:
        """Its score is the time of the use before."""
        for expert in step.given:
            # Those with one use come before all with two, the oldest first.
            self.scores[expert] = self._last.get(expert, step.now - 10**9)
            self._last[expert] = step.now


class LFU(Scored):
    """The least used leaves.

    Args:
        half_every: tokens after which all counts are halved; never without it.
        of_answer: forget everything when a prompt comes, as MoE-Infinity counts by sequence (arXiv 2401.14361).
    """

    def __init__(self, half_every: int = 0, of_answer: bool = False) -> None:
        super().__init__()
        self._half_every = half_every
        self._of_answer = of_answer
        self._halved = 0
        self._prompted = 0

    def saw(self, step: Step) -> None:
        """Its score is how many tokens it was given."""
        if self._of_answer and not step.counts and step.now != self._prompted:
            self._prompted = step.now
            self.scores.clear()
        if self._half_every and step.now // self._half_every > self._halved:
            self._halved = step.now // self._half_every
            self.scores = {expert: score / 2 for expert, score in self.scores.items()}
        for expert, count in step.given.items():
            self.scores[expert] = self.scores.get(expert, 0.0) + count


class LRFU(Scored):
    """The one leaves of whose uses the least is left, each fading by half in so many tokens (Lee et al., 2001).

    Args:
        half_life: in tokens.
    """

    def __init__(self, half_life: float) -> None:
        super().__init__()
        self._half_life = half_life

    def saw(self, step: Step) -> None:
        """Its score is the logarithm of what is left, as it would be at time 0."""
        # The tokens of a prompt are spread evenly over it, so that most of them have faded when it is through.
        rate = math.log(2) / self._half_life
        left = 1.0 if step.tokens == 1 else -math.expm1(-step.tokens * rate) / rate / step.tokens
        for expert, count in step.given.items():
            new = step.now / self._half_life + math.log2(count * left)
            old = self.scores.get(expert, -math.inf)
            high, low = max(old, new), min(old, new)
            self.scores[expert] = high + math.log2(1 + 2.0 ** max(low - high, -1000.0))


class Engines:
    """The engine's own policy, with its own code: LRFU by a half-life that it finds while it runs.

    Args:
        banks: of the trace.
        experts: in each.
        slots: of the cache.
    """

    def __init__(self, banks: int, experts: int, slots: int) -> None:
        from overflowml_core.runtime.experts.policy import Ghosts, Scores

        self._experts = experts
        self._scores = Scores(banks * experts)
        self._ghosts = Ghosts(self._scores, [range(bank * experts, (bank + 1) * experts) for bank in range(banks)], slots)

    @property
    def half_life(self) -> float:
        """In tokens, at present."""
        return self._scores.half_life

    def saw(self, step: Step) -> None:
        """Score, and choose the half-life, as the engine does."""
        for expert, count in step.given.items():
            self._scores.touch(expert, step.tokens, count, step.now)
        if step.given and next(iter(step.given)) // self._experts in self._ghosts.followed:
            self._ghosts.request(step.given, step.counts)

    def coldest(self, cached: Collection[int]) -> int:
        """The one with the lowest score."""
        return min(cached, key=lambda expert: (self._scores.levels[expert], expert))


def led(trace: Trace, slots: int, policy: Policy) -> Found:
    """What a cache with this policy finds; see note [what counts].

    Args:
        trace: that it is led through.
        slots: experts that it has room for.
        policy: not used before.
    """
    there: set[int] = set()
    requests = hits = 0
    for step in trace.steps():
        missed = [expert for expert in step.given if expert not in there]
        if step.counts:
            requests += len(step.given)
            hits += len(step.given) - len(missed)
        policy.saw(step)
        for expert in missed:
            if len(there) >= slots:
                others = there - step.given.keys()
                there.discard(policy.coldest(others or there))
            if len(there) < slots:
                there.add(expert)
    return Found(requests, hits)


def listed(trace: Trace, cached: Collection[int]) -> Found:
    """What a cache finds whose contents never change."""
    there = set(cached)
    asked = [step.given.keys() for step in trace.steps() if step.counts]
    return Found(sum(len(experts) for experts in asked), sum(len(experts & there) for experts in asked))


def optimum(trace: Trace, slots: int) -> Found:
    """The most that any policy can find; see note [optimum]."""
    steps = list(trace.steps())
    following = _next_uses(steps)
    next_use: dict[int, float] = {}
    latest: list[tuple[float, int]] = []
    requests = hits = 0
    for step, uses in zip(steps, following, strict=True):
        if step.counts:
            requests += len(step.given)
            hits += sum(1 for expert in step.given if expert in next_use)
        for expert, use in uses.items():
            if use == math.inf:
                next_use.pop(expert, None)
                continue
            next_use[expert] = use
            heapq.heappush(latest, (-use, expert))
        while len(next_use) > slots:
            use, expert = heapq.heappop(latest)
            if next_use.get(expert) == -use:
                del next_use[expert]
    return Found(requests, hits)


def _next_uses(steps: list[Step]) -> list[dict[int, float]]:
    """For each step and each of its experts, the step that asks for it next; infinite where that does not count or is none."""
    coming: dict[int, float] = {}
    found: list[dict[int, float]] = []
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        found.append({expert: coming.get(expert, math.inf) for expert in step.given})
        coming.update(dict.fromkeys(step.given, float(number) if step.counts else math.inf))
    return found[::-1]


def contestants(trace: Trace, slots: int, before: Trace | None = None) -> dict[str, Callable[[], Found]]:
    """Each policy by its name, ready to be led through a trace.

    Args:
        trace: that they are led through.
        slots: of the cache.
        before: a run with other texts, for the list that never changes; without it there is none.
    """
    banks = trace.expert_count // trace.experts
    policies: dict[str, Callable[[], Policy]] = {
        "LRU": LRU,
        "LRU-2": LRU2,
        "LFU": LFU,
        "LFU, halved every 64 tokens": lambda: LFU(half_every=64),
        "LFU of the answer": lambda: LFU(of_answer=True),
        **{f"LRFU, half-life {life:.0f}": lambda life=life: LRFU(life) for life in (4.0, 16.0, 64.0, 256.0, 1024.0)},
        "the engine's": lambda: Engines(banks, trace.experts, slots),
    }
    found = {name: lambda make=make: led(trace, slots, make()) for name, make in policies.items()}
    if before is not None:
        heat = tokens_by_expert(before)
        warm = sorted(heat, key=lambda expert: -heat[expert])[:slots]
        found["a list from another text"] = lambda: listed(trace, warm)
    found["the optimum"] = lambda: optimum(trace, slots)
    return found


def tokens_by_expert(trace: Trace) -> dict[int, int]:
    """How many tokens each expert was given in all passes."""
    found: dict[int, int] = {}
    for step in trace.steps():
        for expert, count in step.given.items():
            found[expert] = found.get(expert, 0) + count
    return found


def table(trace: Trace, slot_counts: Iterable[int], before: Trace | None = None) -> str:
    """Hit rates of all policies for some sizes of the cache, as Markdown."""
    sizes = list(slot_counts)
    rows: dict[str, list[str]] = {}
    for slots in sizes:
        for name, lead in contestants(trace, slots, before).items():
            rows.setdefault(name, []).append(f"{lead().rate:.3f}")
    heads = [f"{slots} slots ({slots / trace.expert_count:.0%})" for slots in sizes]
    lines = [f"| policy | {' | '.join(heads)} |", "|---" * (len(sizes) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"
