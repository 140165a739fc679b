"""Who stays in the cache of experts: the one that was used most lately, where "lately" is measured while it runs. Knows neither tensors nor
devices.

Note [score]. The score of an expert is the sum over the tokens that it was given of ``2 ** -(age / half_life)``, age in tokens: LRFU (D.
Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used policies", IEEE Transactions on
Computers 50(12), 2001). A short half-life makes it LRU, a long one LFU. Scores are kept as logarithms at time 0, so that they need no
ageing: all of them fade alike. An expert keeps its score while it is not cached.

Note [choice of half-life]. Which half-life is best depends on the model and the text. So caches that hold nothing, one a half-life, are
led through the same requests for a share of the banks, and the real one takes the half-life of that with the most hits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence

HALF_LIVES = (1.0, 16.0, 64.0, 256.0, 1024.0)
"""Tokens. The first is LRU in all but name."""

FIRST_HALF_LIFE = 64.0
"""Before anything was counted; the best or next to it over benchmarks/moe.py's traces."""

_NEVER = -math.inf


class Scores:
    """The scores of all experts by one half-life, cached or not; see note [score]."""

    def __init__(self, count: int, half_life: float) -> None:
        """All experts unused.

        Args:
            count: experts, known by their numbers from 0.
            half_life: in tokens.
        """
        self.half_life = half_life
        self.levels = [_NEVER] * count

    def touch(self, expert: int, tokens: int, given: int, now: int) -> float:
        """Count a pass.

        Args:
            expert: that was asked for.
            tokens: of the pass.
            given: how many of them it was given.
            now: tokens of all passes before.

        Returns:
            Its new score, as a logarithm.
        """
        life = self.half_life
        # The tokens of a pass count as spread evenly over it.
        share = 1.0 if tokens == 1 else life / math.log(2) * -math.expm1(-tokens * math.log(2) / life) / tokens
        level = now / life + math.log2(given * share)
        before = self.levels[expert]
        high, low = (before, level) if before > level else (level, before)
        self.levels[expert] = high if low == _NEVER else high + math.log2(1.0 + 2.0 ** max(low - high, -60.0))
        return self.levels[expert]

    def seed(self, expert: int, share: float) -> None:
        """Take an expert for one that was given this share of all tokens for ever."""
        self.levels[expert] = math.log2(share * self.half_life / math.log(2)) if share > 0 else _NEVER

    def change(self, half_life: float) -> None:
        """Go on with another half-life. What is known of the past is when each expert would have been used once to have its score."""
        factor = self.half_life / half_life
        self.levels = [level * factor for level in self.levels]
        self.half_life = half_life


class Ranking:
    """Cached experts by their scores."""

    def __init__(self, scores: Scores) -> None:
        """Rank none."""
        self.scores = scores
        self.cached: set[int] = set()
        self._heap: list[tuple[float, int]] = []

    def add(self, expert: int) -> None:
        """An expert is cached now."""
        self.cached.add(expert)
        self.renew(expert)

    def renew(self, expert: int) -> None:
        """The score of a cached expert has changed."""
        heapq.heappush(self._heap, (self.scores.levels[expert], expert))
        if len(self._heap) > 8 * len(self.cached) + 64:
            self.rebuild()

    def rebuild(self) -> None:
        """All scores have changed."""
        self._heap = [(self.scores.levels[expert], expert) for expert in self.cached]
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
            if expert not in self.cached or level != self.scores.levels[expert]:
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

    def __init__(self, count: int, slots: int, half_life: float) -> None:
        self._slots = slots
        self._ranking = Ranking(Scores(count, half_life))
        self.hits = 0.0

    @property
    def half_life(self) -> float:
        """In tokens."""
        return self._ranking.scores.half_life

    def request(self, given: Mapping[int, int], tokens: int, now: int) -> None:
        """Lead a pass of one bank through the cache.

        Args:
            given: by expert, how many tokens it is given.
            tokens: of the pass.
            now: tokens of all passes before.
        """
        ranking = self._ranking
        for expert, count in given.items():
            ranking.scores.touch(expert, tokens, count, now)
            if expert in ranking.cached:
                self.hits += 1
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
    """Banks that are followed at most. A request costs each ghost about two microseconds."""

    _REQUESTS = 512
    """After so many requests the ghosts are compared."""

    _MARGIN = 1.02
    """Times the hits of the present half-life that another one must have."""

    _FADE = 0.5
    """Of the hits counted so far, what is left after a comparison: texts change."""

    def __init__(self, banks: Sequence[Sequence[int]], slots: int) -> None:
        """Follow some of the banks.

        Args:
            banks: the numbers of the experts of each.
            slots: of the real cache, for all banks together.
        """
        step = max(1, len(banks) // self._BANKS)
        chosen = list(range(0, len(banks), step))[: self._BANKS]
        self.followed = frozenset(chosen)
        count = sum(len(bank) for bank in banks)
        share = sum(len(banks[index]) for index in chosen) / max(count, 1)
        size = max(1, round(slots * share))
        self._ghosts = [Ghost(count, size, half_life) for half_life in HALF_LIVES]
        self._requests = 0

    def request(self, given: Mapping[int, int], tokens: int, now: int) -> None:
        """Lead a pass of a followed bank through all ghosts; arguments as for :meth:`Ghost.request`."""
        self._requests += len(given)
        for ghost in self._ghosts:
            ghost.request(given, tokens, now)

    def better(self, half_life: float) -> float | None:
        """Another half-life that finds more than the present one does; None where there is none, or too little was seen."""
        if self._requests < self._REQUESTS:
            return None
        self._requests = 0
        present = max((g.hits for g in self._ghosts if g.half_life == half_life), default=0.0)
        best = max(self._ghosts, key=lambda ghost: ghost.hits)
        is_better = best.half_life != half_life and best.hits > present * self._MARGIN
        for ghost in self._ghosts:
            ghost.hits *= self._FADE
        return best.half_life if is_better else None


def warmest(scores: Scores, count: int) -> list[int]:
    """The experts with the highest scores, the highest first; those that were never used are none of them."""
    known = (expert for expert, level in enumerate(scores.levels) if level > _NEVER)
    return heapq.nlargest(count, known, key=lambda expert: scores.levels[expert])
