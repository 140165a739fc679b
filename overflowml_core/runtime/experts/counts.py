"""What is counted while experts run. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass, field

from overflowml_core.expert_report import BankReport


@dataclass(slots=True)
class BankCounts:
    """Counters of one bank; see :class:`overflowml_core.expert_report.BankReport`."""

    component: str
    block: str
    per_token: int
    expert_bytes: int
    tokens: list[int]
    requests: int = 0
    hits: int = 0
    fetched_bytes: int = 0

    def report(self, cached: tuple[int, ...]) -> BankReport:
        """As they stand now."""
        return BankReport(
            self.component,
            self.block,
            self.per_token,
            self.expert_bytes,
            self.requests,
            self.hits,
            self.fetched_bytes,
            tuple(self.tokens),
            cached,
        )


@dataclass(slots=True)
class Counts:
    """Counters of all banks of a phase; see :class:`overflowml_core.expert_report.ExpertReport`."""

    banks: list[BankCounts] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    stall_s: float = 0.0
    prefetched: int = 0
    prefetch_hits: int = 0
    on_cpu: int = 0
    token_requests: int = 0
    token_hits: int = 0

    def reset(self) -> None:
        """Start anew."""
        for bank in self.banks:
            bank.tokens = [0] * len(bank.tokens)
            bank.requests = bank.hits = bank.fetched_bytes = 0
        self.tokens = self.passes = self.prefetched = self.prefetch_hits = self.on_cpu = 0
        self.token_requests = self.token_hits = 0
        self.stall_s = 0.0
