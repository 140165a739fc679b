"""How long a layer waits for experts that it misses, on the average over tokens. Knows neither tiers nor rates.

Note [average]. A layer that misses one expert of eight on the average often misses none, and sometimes three: what computes meanwhile hides
a single read, and not three. So waits are averaged, not misses: each expert that is asked for is missed with the same probability,
independently of the others. Beyond ``_FEW`` experts the number that is missed is hardly ever far from its mean, which stands for it.

Note [last ones]. Experts that come at once share the rate, and are there at about the same time. So those that come last hide nothing: they
compute when everything else is over. Against a replay of single layers, event by event, that is right within 6 % of a layer's time where
computing is the shorter part, and 11 % too long in the worst case found.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb

_FEW = 64


def expected_wait_s(asked: tuple[float, float], at_once: int, compute_s: float, fetch_s: Callable[[float], float]) -> float:
    """Seconds by which missed experts make a layer longer than the computing of its experts.

    Args:
        asked: experts that are asked for, and how many of them are missed on the average; in experts.
        at_once: experts that are fetched at the same time.
        compute_s: of all experts that are asked for, in seconds.
        fetch_s: seconds from the request of so many experts until the last one is there; rises with their number.
    """
    touched, missed = asked
    if touched <= 0 or missed <= 0:
        return 0.0
    count = max(1, round(touched))
    share = min(1.0, missed / touched)
    if count > _FEW:
        return _wait_s(missed, touched, at_once, compute_s, fetch_s)
    return sum(
        comb(count, number) * share**number * (1 - share) ** (count - number) * _wait_s(number, count, at_once, compute_s, fetch_s)
        for number in range(1, count + 1)
    )


def _wait_s(missed: float, touched: float, at_once: int, compute_s: float, fetch_s: Callable[[float], float]) -> float:
    """Of one pass; see note [last ones]."""
    hidden_s = compute_s * max(0.0, 1 - min(missed, at_once) / touched)
    return max(0.0, fetch_s(missed) - hidden_s)
