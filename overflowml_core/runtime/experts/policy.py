"""Who stays in the cache of experts: the one that was used most lately, where "lately" is measured while it runs. Knows neither tensors nor
devices.

Note [score]. The score of an expert is the sum over the tokens that it was given of ``2 ** -(age / half_life)``, age in tokens: LRFU (D.
Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used policies", IEEE Transactions on
Computers 50(12), 2001). A short half-life makes it LRU, a long one LFU. Scores are kept as logarithms at time 0, so that they need no
ageing: all of them fade alike. An expert keeps its score while it is not cached.

Note [choice of half-life]. Which half-life is best depends on the model and the text. So caches that hold nothing, one a half-life, are led
through the same requests for a share of the banks, and the real one goes by the half-life of that with the most hits. All scores are kept
for each of them, so that nothing is forgotten by a change. Hits of prompts that touch most experts do not count: they want whatever is
there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

HALF_LIVES = (4.0, 16.0, 64.0, 256.0)
"""Tokens. On the traces of benchmarks/moe.py, 16 to 256 are within 7 % of each other and LRU finds up to a third less; 4 is for text that
jumps."""

FIRST_HALF_LIFE = 64.0
"""Before anything was counted: within 1 % of the best on the traces of benchmarks/moe.py, at all sizes of the cache."""

_NEVER = -math.inf


class Scores:
    """The scores of all experts, cached or not, by several half-lives of which one counts; see note [score]."""

    def __init__(self, count: int, half_life: float = FIRST_HALF_LIFE, others: Iterable[float] = HALF_LIVES) -> None:
        """All experts unused.

        Args:
            count: experts, known by their numbers from 0.
            half_life: that counts, in tokens.
            others: that may count later.
        """
        self.by_half_life: dict[float, list[float]] = {life: [_NEVER] * count for life in {half_life, *others}}
        self.half_life = half_life

    @property
    def levels(self) -> list[float]:
        """The score of each expert by the half-life that counts, as a logarithm."""
        return self.by_half_life[self.half_life]

    def touch(self, expert: int, tokens: int, given: int, now: int) -> None:
        """Count a pass.

        Args:
            expert: that was asked for.
            tokens: of the pass.
            given: how many of them it was given.
            now: tokens of all passes so far.
        """
        for life, levels in self.by_half_life.items():
            # The tokens of a pass count as spread evenly over it.
            share = 1.0 if tokens == 1 else life / math.log(2) * -math.expm1(-tokens * math.log(2) / life) / tokens
            level, before = now / life + math.log2(given * share), levels[expert]
            high, low = (before, level) if before > level else (level, before)
            levels[expert] = high if low == _NEVER else high + math.log2(1.0 + 2.0 ** max(low - high, -60.0))

    def seed(self, expert: int, share: float) -> None:
        """Take an expert for one that was given this share of all tokens for ever."""
        for life, levels in self.by_half_life.items():
            levels[expert] = math.log2(share * life / math.log(2)) if share > 0 else _NEVER

    def extend(self, count: int) -> None:
        """Add experts that were never used."""
        for levels in self.by_half_life.values():
            levels += [_NEVER] * count


class Ranking:
    """Cached experts by their scores."""

    def __init__(self, levels: list[float]) -> None:
        """Rank none.

        Args:
            levels: scores of all experts; whoever changes them says so by :meth:`renew`.
        """
        self.cached: set[int] = set()
        self.levels = levels
        self._heap: list[tuple[float, int]] = []

    def add(self, expert: int) -> None:
        """An expert is cached now."""
        self.cached.add(expert)
        self.renew(expert)

    def renew(self, expert: int) -> None:
        """The score of a cached expert has changed."""
        heapq.heappush(self._heap, (self.levels[expert], expert))
        if len(self._heap) > 8 * len(self.cached) + 64:
            self.rank_by(self.levels)

    def rank_by(self, levels: list[float]) -> None:
        """Go by other scores."""
        self.levels = levels
        self._heap = [(levels[expert], expert) for expert in self.cached]
        heapq.heapify(self._heap)

    def drop(self, expert: int) -> None:
        """An expert is cached no longer."""
        self.cached.discard(expert)

    def coldest(self, held: Collection[int]) -> int | None:
        """The cached expert with the lowest score that is not held; None where all are."""
        aside: list[tuple[float, int]] = []
        found = None
        while self._heap:
            level, expert = self._heap[0]
            if expert not in self.cached or level != self.levels[expert]:
                heapq.heappop(self._heap)
            elif expert in held:
                aside.append(heapq.heappop(self._heap))
            else:
                found = expert
                break
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found


class Ghost:
    """A cache that holds nothing, and counts what it would have found."""

    def __init__(self, levels: list[float], slots: int) -> None:
        """An empty one.

        Args:
            levels: scores of all experts that it goes by.
            slots: how many it has room for.
        """
        self._slots = slots
        self._ranking = Ranking(levels)
        self.hits = 0.0

    def request(self, given: Iterable[int], counts: bool) -> None:
        """Lead a pass of one bank through the cache, whose scores know of it already.

        Args:
            given: experts that are asked for.
            counts: whether hits do.
        """
        ranking = self._ranking
        for expert in given:
            if expert in ranking.cached:
                self.hits += counts
                ranking.renew(expert)
                continue
            if len(ranking.cached) >= self._slots:
                coldest = ranking.coldest(())
                if coldest is not None:
                    ranking.drop(coldest)
            ranking.add(expert)


class Ghosts:
    """Finds the half-life for a cache while it runs; see note [choice of half-life]."""

    _BANKS = 4
    """Banks that are followed at most. A request costs each ghost about a microsecond."""

    _REQUESTS = 1024
    """After so many requests the ghosts are compared."""

    _MARGIN = 1.02
    """Times the hits of the present half-life that another one must have."""

    _FADE = 0.75
    """Of the hits counted so far, what is left after a comparison: texts change."""

    def __init__(self, scores: Scores, banks: Sequence[Sequence[int]], slots: int) -> None:
        """Follow some of the banks.

        Args:
            scores: of all experts.
            banks: the numbers of the experts of each.
            slots: of the real cache, for all banks together.
        """
        step = max(1, len(banks) // self._BANKS)
        chosen = list(range(0, len(banks), step))[: self._BANKS]
        self.followed = frozenset(chosen)
        self._scores = scores
        share = sum(len(banks[index]) for index in chosen) / max(sum(len(bank) for bank in banks), 1)
        size = max(1, round(slots * share))
        self._ghosts = {life: Ghost(levels, size) for life, levels in scores.by_half_life.items()}
        self._requests = 0

    def request(self, given: Mapping[int, int], counts: bool) -> bool:
        """Lead a pass of a followed bank through all ghosts; another half-life counts from now on where it finds more.

        Args:
            given: by expert, how many tokens it is given; the scores know of it already.
            counts: whether its hits do.

        Returns:
            Whether another one counts now.
        """
        for ghost in self._ghosts.values():
            ghost.request(given, counts)
        self._requests += len(given) * counts
        if self._requests < self._REQUESTS:
            return False
        self._requests = 0
        present = self._scores.half_life
        best = max(self._ghosts, key=lambda life: self._ghosts[life].hits)
        is_better = self._ghosts[best].hits > self._ghosts[present].hits * self._MARGIN
        for ghost in self._ghosts.values():
            ghost.hits *= self._FADE
        if is_better:
            self._scores.half_life = best
        return is_better


def warmest(levels: Sequence[float], count: int) -> list[int]:
    """The experts with the highest scores, the highest first; those that were never used are none of them."""
    known = (expert for expert, level in enumerate(levels) if level > _NEVER)
    return heapq.nlargest(count, known, key=lambda expert: levels[expert])
