"""How many of the experts that a pass asks for are in the cache. Arithmetic over numbers of experts; knows neither bytes nor seconds.

Note [hit rate]. What stays in the cache is what was used most lately, and how long "lately" is, the runtime finds out: it lies between the
cache of what was used last (LRU) and that of what is used most (LFU). Where a run has left the share of the tokens that each expert gets
(its heat), both are known if tokens choose independently of each other: LFU holds the hottest experts, LRU by Che's approximation those
that were asked for within its characteristic time (H. Che, Y. Tung, Z. Wang: Hierarchical Web caching systems, IEEE JSAC 20(7), 2002).
Scores that forget never rank the hottest quite right: led through random requests of Zipf-like heats (exponents 0.6 to 1.4, a sixteenth to
three quarters of the experts cached), the runtime's policy gets about nine tenths of the way from LRU to LFU.

Note [alike]. Neighbouring tokens of real text choose more alike than that knows, which makes for more hits. How many more, earlier runs
say: the odds of a hit were higher by some factor than heat alone has them for their caches, and are taken to be higher by the same one
for caches of other sizes. Led through a trace of a model with 16 banks of 128 experts, with caches of an eighth to six tenths of them,
factors were 1.28 to 1.44; hit rates by the factor of one of these sizes were off by at most 0.033 for the others, and by up to 0.09
without. A run counts by what it can tell: one that hardly missed anything tells nothing of the odds, and fewer hits than by heat alone
tell of a cache that was cold, or of other texts.

Note [without heat]. On a model with 512 experts a layer a least-recently-used cache of 64 of them finds 67 % of those that a token asks
for, one of 128 finds 81 % (llama.cpp, pull request 27861). Between these points the model draws straight lines over the share of all
experts that is cached. A pass that touches most experts (a prefill) finds the share that is cached.

Note [transit]. Experts that are missed pass through slots, and take them from the coldest: what is kept has as many slots less as a pass
misses of one bank, for which half of what it asks for is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, exp, inf, log, log1p

from overflowml_core.facts import Experts

_HIT_POINTS = ((0.0, 0.0), (64 / 512, 0.67), (128 / 512, 0.81), (1.0, 1.0))
"""(share of experts cached, share of those asked for that are found); see note [without heat]."""

_RANKED = 0.9
"""How far the runtime gets from LRU to LFU; see note [hit rate]."""

_SURE = 1 - 1e-12
"""Of a probability, so that its logarithm is finite."""

_LARGEST_FACTOR = 20.0
"""By which odds of hits are taken to differ from those of heat alone; more says that a run was of something else."""

_MOST_STEPS = 100
_CLOSE_ENOUGH = 1e-4
"""Of the slots, for the characteristic time."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a pass asks of one bank: how many different experts, and how many of these the cache does not hold. Expected values."""

    touched: float
    missed: float


def touched_experts(experts: Experts, tokens: int) -> float:
    """How many different experts so many tokens ask for; by their heat where it is known, else as if each chose at random."""
    if _is_known(experts):
        return sum(_asked_for(experts.heat, tokens))
    return experts.count * (1 - (1 - min(1.0, experts.per_token / experts.count)) ** tokens)


@lru_cache(maxsize=64)
def asked_of(banks: tuple[Experts, ...], slots: int, tokens: int) -> tuple[Asked, ...]:
    """What a pass asks of banks that share a cache.

    Args:
        banks: those that the pass runs through.
        slots: experts of any bank that the cache holds.
        tokens: of the pass.
    """
    touched = [touched_experts(bank, tokens) for bank in banks]
    if slots >= sum(bank.count for bank in banks):
        return tuple(Asked(number, 0.0) for number in touched)
    kept = max(0, slots - ceil(max(touched, default=0.0) / 2))
    if all(_is_known(bank) for bank in banks):
        missed = _missed_by_heat(banks, slots, kept, tokens)
        factor = _alike(banks)
        missed = [_with_odds(lost, number, factor, bank) for lost, number, bank in zip(missed, touched, banks, strict=True)]
    else:
        cached = kept / sum(bank.count for bank in banks)
        missed = [number * (1 - _found(cached, 2 * number > bank.count)) for bank, number in zip(banks, touched, strict=True)]
    return tuple(Asked(number, lost) for number, lost in zip(touched, missed, strict=True))


def _missed_by_heat(banks: Sequence[Experts], slots: int, kept: int, tokens: int) -> list[float]:
    """Experts of each bank that a pass misses if tokens choose independently of each other; see note [hit rate]."""
    rates = [_asked_for(bank.heat, tokens) for bank in banks]
    lru, lfu = lru_misses(rates, slots), lfu_misses([bank.heat for bank in banks], rates, kept)
    return [latest + _RANKED * (min(most, latest) - latest) for latest, most in zip(lru, lfu, strict=True)]


def _with_odds(missed: float, touched: float, factor: float, experts: Experts) -> float:
    """Misses of a bank where odds of hits are so many times as high; a pass that touches most experts chooses as it must."""
    if not 0 < missed < touched or 2 * touched > experts.count:
        return missed
    return touched * missed / (missed + (touched - missed) * factor)


@lru_cache(maxsize=64)
def _alike(banks: tuple[Experts, ...]) -> float:
    """How many times as high as by heat alone the odds of a hit were in earlier runs, at least 1; see note [alike]."""
    touched = [touched_experts(bank, 1) for bank in banks]
    logarithm = total = 0.0
    for run in banks[0].runs:
        kept = max(0, run.slots - ceil(max(touched, default=0.0) / 2))
        missed = sum(_missed_by_heat(banks, run.slots, kept, 1)) / sum(touched)
        if run.slots >= sum(bank.count for bank in banks) or not 0 < missed < 1:
            continue
        weight = run.requests * missed * (1 - missed)  # Fisher's information on the logarithm of odds
        # Half a request more on either side: a run without a single miss says that there are few, not none.
        logarithm += weight * log((run.hits + 0.5) / (run.requests - run.hits + 0.5) * missed / (1 - missed))
        total += weight
    return min(_LARGEST_FACTOR, exp(max(0.0, logarithm / total))) if total else 1.0


def lfu_misses(heats: Sequence[Sequence[float]], rates: Sequence[Sequence[float]], slots: int) -> list[float]:
    """Experts of each bank that a pass misses where the hottest of all banks are cached.

    Args:
        heats: by bank and expert; what the hottest are chosen by.
        rates: by bank and expert, the probability that a pass asks for it.
        slots: how many are cached.
    """
    ranked = sorted(((heat, place, number) for place, bank in enumerate(heats) for number, heat in enumerate(bank)), reverse=True)
    missed = [0.0] * len(heats)
    for _, place, number in ranked[slots:]:
        missed[place] += rates[place][number]
    return missed


def lru_misses(rates: Sequence[Sequence[float]], slots: int) -> list[float]:
    """Experts of each bank that a pass misses where those that were asked for last are cached; see note [hit rate].

    Args:
        rates: by bank and expert, the probability that a pass asks for it.
        slots: how many are cached.
    """
    # An expert is asked for once a pass at most: after so many passes it was not with (1 - rate) to their power.
    decays = [[-log1p(-min(rate, _SURE)) for rate in bank] for bank in rates]
    passes = _characteristic_passes([decay for bank in decays for decay in bank if decay > 0], slots)
    # Only whole passes count, which is half a pass less on the average.
    kept = max(0.0, passes - 0.5)
    return [sum(r * exp(-d * kept) for r, d in zip(bank, own, strict=True) if r > 0) for bank, own in zip(rates, decays, strict=True)]


def _characteristic_passes(decays: Sequence[float], slots: int) -> float:
    """Passes after which an expert that nobody asked for leaves the cache: in these, as many are asked for as there are slots."""
    if slots >= len(decays):
        return inf
    passes = 0.0
    # Newton's method from the left: the number asked for is concave in time, so that no step goes too far.
    for _ in range(_MOST_STEPS):
        left = [exp(-decay * passes) for decay in decays]
        lacking = slots - len(decays) + sum(left)
        if lacking <= _CLOSE_ENOUGH * slots:
            break
        passes += lacking / sum(decay * rest for decay, rest in zip(decays, left, strict=True))
    return passes


def _is_known(experts: Experts) -> bool:
    return len(experts.heat) == experts.count and any(experts.heat)


def _asked_for(heat: Sequence[float], tokens: int) -> list[float]:
    """By expert, the probability that at least one of so many tokens goes to it."""
    return [1 - (1 - min(1.0, share)) ** tokens for share in heat]


def _found(cached: float, touches_most: bool) -> float:
    if touches_most:
        return cached
    for (left, low), (right, high) in pairwise(_HIT_POINTS):
        if cached <= right:
            return low + (high - low) * (cached - left) / (right - left)
    return 1.0
