"""What a picture of expert heat shows, however it is drawn: rows of shares, levels, and the figures beside them. Draws nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.expert_report import BankReport
from overflowml_core.heat import BankHeat, Heat

EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Between two levels: how many times the share that each expert would have if all were chosen as often."""

LEVELS = len(EDGES) + 1
LEVEL_WORDS = ("under 1/8", "1/8 to 1/4", "1/4 to 1/2", "1/2 to 1", "1 to 2", "2 to 4", "4 to 8", "over 8")
"""Of the even share, for each level."""


@dataclass(frozen=True, slots=True)
class Row:
    """One bank of experts.

    Attributes:
        label: its block, as short as it can be told from the others.
        ratios: what each expert is given, in even shares.
        cached: experts that were in the cache when the last run was counted; None where it did not say.
        hit_rate: share of those asked for that were there, in the last run; None where none was asked for.
        bytes_per_token: brought in for each token of the last run; None where there was none.
        busiest: share of all that the busiest tenth of the experts is given.
        unused: experts that were never chosen.
    """

    label: str
    ratios: tuple[float, ...]
    cached: frozenset[int] | None
    hit_rate: float | None
    bytes_per_token: float | None
    busiest: float
    unused: int


def rows_of(heat: Heat) -> tuple[Row, ...]:
    """A row for each bank of which something is known, in order of execution."""
    run = heat.runs[-1] if heat.runs else None
    reports = {(bank.component, bank.block): bank for bank in run.report.banks} if run is not None else {}
    banks = [bank for bank in heat.banks if any(bank.counts)]
    labels = _labels(banks)
    tokens = run.report.tokens if run is not None else 0
    return tuple(_row(label, bank, reports.get((bank.component, bank.block)), tokens) for label, bank in zip(labels, banks, strict=True))


def level_of(ratio: float) -> int:
    """The level of so many even shares, from 0 to ``LEVELS - 1``."""
    return bisect_right(EDGES, ratio)


def grouped(row: Row, columns: int) -> list[tuple[float, float]]:
    """A row in so many columns at most: of the experts of each their mean, in even shares, and the part that is cached."""
    size = max(1, math.ceil(len(row.ratios) / max(1, columns)))
    cells = []
    for start in range(0, len(row.ratios), size):
        members = range(start, min(start + size, len(row.ratios)))
        cached = sum(member in row.cached for member in members) / len(members) if row.cached is not None else 0.0
        cells.append((sum(row.ratios[member] for member in members) / len(members), cached))
    return cells


def _row(label: str, bank: BankHeat, report: BankReport | None, tokens: int) -> Row:
    count, total = len(bank.counts), sum(bank.counts)
    busiest = sum(sorted(bank.counts, reverse=True)[: max(1, count // 10)]) / total
    return Row(
        label=label,
        ratios=tuple(number * count / total for number in bank.counts),
        cached=frozenset(report.cached) if report is not None and len(report.tokens) == count else None,
        hit_rate=report.hits / report.requests if report is not None and report.requests else None,
        bytes_per_token=report.fetched_bytes / tokens if report is not None and tokens else None,
        busiest=busiest,
        unused=bank.counts.count(0),
    )


def _labels(banks: Sequence[BankHeat]) -> list[str]:
    """The blocks' paths without what all of them begin with, behind their component where there are several."""
    several = len({bank.component for bank in banks}) > 1
    paths = [[*([bank.component] if several else []), *bank.block.split(".")] for bank in banks]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    # One name of what is shared says what is counted: "layers.7", not "7".
    return [".".join(path[max(0, shared - 1) :]) for path in paths]
