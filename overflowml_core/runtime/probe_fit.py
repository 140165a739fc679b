"""Continues profiles from a few small workloads to a large one, for code whose trace grows with every token. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from overflowml_core.work import BlockWork, PassProfile, Work

_ROUGH_BYTES = 16384
"""Second differences of a peak up to this come from rounding storages up, not from growth: a peak has a few storages, each off by up to
511 bytes."""


def continued(profiles: Sequence[PassProfile], points: Sequence[int], target: int, count: int, note: str) -> PassProfile:
    """One kind of pass at another size, from traces at three sizes with equal steps between them.

    Operations and bytes of a pass are polynomials of at most the second degree in its tokens (attention over pairs of them), so that three
    points give them exactly. Peaks are not, and follow the line through the last two points where they do not grow faster.

    Args:
        profiles: the pass at each point.
        points: tokens, rising by equal steps.
        target: tokens that are asked for.
        count: how often the pass happens there.
        note: why it was not traced there.
    """
    blocks = tuple(
        BlockWork(
            _works([block.works for block in same], points, target),
            _peak([block.activation_bytes for block in same], points, target),
            same[-1].calls,
        )
        for same in zip(*(profile.blocks for profile in profiles), strict=True)
    )
    cache = round(_through([profile.cache_bytes for profile in profiles], points, target))
    peak = max(_peak([profile.activation_bytes for profile in profiles], points, target), cache)
    outside = _works([profile.outside for profile in profiles], points, target)
    return PassProfile(profiles[-1].name, count, peak, blocks, outside, cache, "analytic", note)


def _works(traces: Sequence[Sequence[Work]], points: Sequence[int], target: int) -> tuple[Work, ...]:
    """Works by kind and dtype: signatures name shapes, which differ from point to point."""
    totals: dict[tuple[str, str], list[list[int]]] = {}
    for index, works in enumerate(traces):
        for work in works:
            rows = totals.setdefault((work.kind, work.dtype), [[0, 0, 0, 0] for _ in traces])
            for column, value in enumerate((work.flop, work.traffic_bytes, work.weight_bytes, work.calls)):
                rows[index][column] += value
    found: list[Work] = []
    for (kind, dtype), rows in totals.items():
        flop, traffic, weights, calls = (max(0, round(_through([row[column] for row in rows], points, target))) for column in range(4))
        found.append(Work(kind, dtype, flop, max(traffic, weights), weights, max(calls, 1)))
    return tuple(found)


def _through(values: Sequence[int], points: Sequence[int], target: int) -> Fraction:
    """Lagrange's polynomial through the points, exactly."""
    total = Fraction(0)
    for i, value in enumerate(values):
        term = Fraction(value)
        for j, point in enumerate(points):
            if j != i:
                term *= Fraction(target - point, points[i] - point)
        total += term
    return total


def _peak(values: Sequence[int], points: Sequence[int], target: int) -> int:
    bend = values[-1] - 2 * values[-2] + values[-3]
    degree = 3 if bend > _ROUGH_BYTES else 2
    return max(0, round(_through(values[-degree:], points[-degree:], target)))
