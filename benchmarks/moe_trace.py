"""Which experts passes asked for: recorded at the routers, kept as JSON, and described by a few numbers. Knows nothing of caches."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FITTED = (4, 64)
"""Ranks over which the exponent is fitted: above, an expert cannot be asked for more than once a token; below, counts are small."""


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        tokens: that went through it.
        banks: for each bank, by expert, how many of them it was given.
    """

    tokens: int
    banks: tuple[Mapping[int, int], ...]

    @property
    def is_decode(self) -> bool:
        """Whether it is one of those whose hits count."""
        return self.tokens == 1


@dataclass(frozen=True)
class Step:
    """What one bank asks for in one pass.

    Attributes:
        given: tokens of each expert, by numbers that run through all banks.
        tokens: of the pass.
        now: tokens of all passes up to this one.
        counts: whether hits are counted.
    """

    given: Mapping[int, int]
    tokens: int
    now: int
    counts: bool


@dataclass(frozen=True)
class Trace:
    """Passes in order.

    Attributes:
        experts: in a bank.
        per_token: of them, for a token.
        passes: all of them.
    """

    experts: int
    per_token: int
    passes: tuple[Pass, ...]

    @property
    def expert_count(self) -> int:
        """In all banks."""
        return self.experts * (len(self.passes[0].banks) if self.passes else 0)

    def steps(self) -> Iterator[Step]:
        """What the banks ask for, one after the other."""
        now = 0
        for one in self.passes:
            now += one.tokens
            for bank, given in enumerate(one.banks):
                first = bank * self.experts
                yield Step({first + expert: count for expert, count in given.items()}, one.tokens, now, one.is_decode)

    def write(self, file: Path) -> None:
        """Keep it as JSON."""
        passes = [{"tokens": p.tokens, "banks": [sorted(bank.items()) for bank in p.banks]} for p in self.passes]
        file.write_text(json.dumps({"experts": self.experts, "per_token": self.per_token, "passes": passes}), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Trace:
        """Read one that was kept."""
        found = json.loads(file.read_text("utf-8"))
        passes = tuple(Pass(p["tokens"], tuple(dict(map(tuple, bank)) for bank in p["banks"])) for p in found["passes"])
        return cls(found["experts"], found["per_token"], passes)


@dataclass
class Recorder:
    """Notes what routers choose; while passes are timed only references to small tensors are kept."""

    experts: int
    per_token: int
    _chosen: list[list[Any]] = field(default_factory=list)

    def watch(self, routers: Sequence[Any]) -> None:
        """Listen at these modules, in order of execution; they answer (logits, weights, indices)."""
        for bank, router in enumerate(routers):
            router.register_forward_hook(lambda _module, _inputs, output, bank=bank: self._note(bank, output[2]))

    def _note(self, bank: int, indices: Any) -> None:
        if bank == 0:
            self._chosen.append([])
        self._chosen[-1].append(indices)

    def take(self) -> Trace:
        """All passes since the last time."""
        passes = tuple(
            Pass(indices[0].shape[0], tuple(dict(Counter(chosen.flatten().tolist())) for chosen in indices)) for indices in self._chosen
        )
        self._chosen = []
        return Trace(self.experts, self.per_token, passes)


def joined(traces: Sequence[Trace]) -> Trace:
    """One behind the other."""
    return Trace(traces[0].experts, traces[0].per_token, tuple(one for trace in traces for one in trace.passes))


def popularity(trace: Trace) -> list[float]:
    """Share of the tokens that go to the most used expert of a bank, to the second, and so on: means over the banks."""
    tokens = sum(p.tokens for p in trace.passes)
    shares = [0.0] * trace.experts
    banks = len(trace.passes[0].banks)
    for bank in range(banks):
        counts: Counter[int] = Counter()
        for one in trace.passes:
            counts.update(one.banks[bank])
        for rank, (_, count) in enumerate(counts.most_common()):
            shares[rank] += count / tokens / banks
    return shares


def zipf_exponent(shares: Sequence[float]) -> float:
    """The exponent of the power of the rank that these shares fall with, by least squares over the middle ranks."""
    points = [(math.log(rank), math.log(share)) for rank, share in enumerate(shares, 1) if _FITTED[0] <= rank <= _FITTED[1] and share > 0]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return -sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def overlap(trace: Trace) -> float:
    """Share of a token's experts that the token before it used, too."""
    same = asked = 0
    for before, after in zip(trace.passes, trace.passes[1:], strict=False):
        if before.is_decode and after.is_decode:
            for old, new in zip(before.banks, after.banks, strict=True):
                same += len(set(old) & set(new))
                asked += len(new)
    return same / asked if asked else 0.0
