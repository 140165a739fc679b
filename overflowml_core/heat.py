"""How often each routed expert was chosen, and what the last runs counted, as frozen values. Knows nothing of files.

Note [forgetting]. Counts of a bank stand for at most ``MOST_TOKENS`` tokens. Whenever a run would bring them above that, all older counts
are halved until it does not: a thing that was asked last year says little of what is asked today. So the half-life of a count is between
one and two times ``MOST_TOKENS`` tokens that were seen after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from overflowml_core.errors import OverflowmlError
from overflowml_core.expert_report import BankReport, ExpertReport
from overflowml_core.facts import CacheRun, Network

MOST_TOKENS = 65_536
"""Tokens that the counts of a bank stand for at most, unless a single run had more; see note [forgetting]."""

MOST_RUNS = 4
"""Runs of a network that are kept with all that they counted; the newest."""


LEAST_TOKENS = 32
"""Of a run, for its hits to be a measurement of anything."""


class BadHeat(OverflowmlError):
    """A heat map that cannot be read, or that contradicts itself."""


@dataclass(frozen=True, slots=True)
class BankHeat:
    """How often each expert of one bank was chosen: tokens that were given to it, of ``per_token`` experts that each token goes to."""

    component: str
    block: str
    per_token: int
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the counts stand for."""
        return sum(self.counts) // max(1, self.per_token)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the tokens that goes to each expert; they sum to ``per_token``. Empty where no token was seen."""
        total = sum(self.counts)
        return tuple(self.per_token * count / total for count in self.counts) if total else ()


@dataclass(frozen=True, slots=True)
class Run:
    """What was counted while a network ran under one plan.

    Attributes:
        key: tells it from other runs of the network; one that is saved again and again keeps its key.
        source: where the model came from, for people.
        device: what computed, as torch names it.
        ended_s: when this was counted, in seconds since 1970.
        pass_s: seconds within passes by the host's clock; 0 where nobody looked at it.
        report: the counts.
    """

    key: str
    source: str
    device: str
    ended_s: float
    pass_s: float
    report: ExpertReport

    @property
    def stall_share(self) -> float | None:
        """Share of the passes' time in which computing waited for experts; None where that time is not known."""
        return min(1.0, self.report.stall_s / self.pass_s) if self.pass_s > 0 else None


@dataclass(frozen=True, slots=True)
class Heat:
    """The heat map of a network: one entry for each bank in order of execution, and its last runs, the newest at the end."""

    fingerprint: str
    network: str
    banks: tuple[BankHeat, ...] = ()
    runs: tuple[Run, ...] = ()

    def shares(self, component: str, block: str) -> tuple[float, ...]:
        """Share of the tokens that goes to each expert of a block; they sum to the experts of a token. Empty where nothing is known."""
        found = (bank.shares for bank in self.banks if (bank.component, bank.block) == (component, block))
        return next(found, ())

    def by_block(self) -> dict[tuple[str, str], tuple[float, ...]]:
        """The shares of all blocks of which something is known, by component and block."""
        return {(bank.component, bank.block): bank.shares for bank in self.banks if any(bank.counts)}

    def cache_runs(self) -> tuple[CacheRun, ...]:
        """What the caches of the last runs found, in passes of single tokens; without those that saw too few of them to tell."""
        reports = [run.report for run in self.runs]
        return tuple(
            CacheRun(report.slots, report.token_requests, report.token_hits)
            for report in reports
            if report.token_requests >= LEAST_TOKENS * sum(bank.per_token for bank in report.banks)
        )

    def with_run(self, run: Run, before: ExpertReport | None = None) -> Heat:
        """The map with what a run counted.

        Args:
            run: put in the place of the one with the same key, where there is one.
            before: what the same run had counted when it was put in last; only what came since is added.
        """
        kept = tuple(one for one in self.runs if one.key != run.key)
        gains = _gained(run.report, before)
        known = {(bank.component, bank.block): bank for bank in self.banks}
        # In the order of the run: a plan names all banks of its network.
        banks = tuple(_added(known.pop((gain.component, gain.block), None), gain) for gain in gains)
        return replace(self, banks=(*banks, *known.values()), runs=(*kept, run)[-MOST_RUNS:])


def with_shares(network: Network, heat: Heat) -> Network:
    """The network with the heat of its experts filled in. Its fingerprint is of its weights alone, and stays."""
    components = []
    runs = heat.cache_runs()
    for component in network.components:
        blocks = []
        for block in component.blocks:
            shares = heat.shares(component.name, block.name)
            if block.experts is not None and len(shares) == block.experts.count:
                block = replace(block, experts=replace(block.experts, heat=shares, runs=runs))
            blocks.append(block)
        components.append(replace(component, blocks=tuple(blocks)))
    return replace(network, components=tuple(components))


def _gained(report: ExpertReport, before: ExpertReport | None) -> tuple[BankHeat, ...]:
    earlier = {(bank.component, bank.block): bank.tokens for bank in before.banks} if before is not None else {}
    return tuple(_gain(bank, earlier.get((bank.component, bank.block), ())) for bank in report.banks)


def _gain(bank: BankReport, earlier: tuple[int, ...]) -> BankHeat:
    counts = bank.tokens
    # Fewer than before: somebody reset the counts, and all that is there is new.
    if len(earlier) == len(counts) and all(now >= then for now, then in zip(counts, earlier, strict=True)):
        counts = tuple(now - then for now, then in zip(counts, earlier, strict=True))
    return BankHeat(bank.component, bank.block, bank.per_token, counts)


def _added(known: BankHeat | None, gain: BankHeat) -> BankHeat:
    """A bank's counts with those of a run; see note [forgetting]."""
    if known is None or len(known.counts) != len(gain.counts):
        return gain
    counts = known.counts
    most = MOST_TOKENS * max(1, gain.per_token)
    while any(counts) and sum(counts) + sum(gain.counts) > most:
        counts = tuple(count // 2 for count in counts)
    return replace(gain, counts=tuple(old + new for old, new in zip(counts, gain.counts, strict=True)))
