"""What was counted while routed experts ran apart from their blocks. Plain values; knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BankReport:
    """One bank of experts.

    Attributes:
        component, block: whose experts.
        per_token: experts that a token is routed to.
        expert_bytes: of one expert.
        requests: experts that passes asked for, each once a pass.
        hits: of them, those that had stayed in the cache; not those that were brought in ahead of time.
        fetched_bytes: brought in from outside, ahead of time or not.
        tokens: tokens that each expert was given.
        cached: which experts are in the cache now, sorted.
    """

    component: str
    block: str
    per_token: int
    expert_bytes: int
    requests: int
    hits: int
    fetched_bytes: int
    tokens: tuple[int, ...]
    cached: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """All banks of a plan since it was attached, or since the last reset.

    Attributes:
        banks: in order of execution.
        tokens: tokens that went through the first bank.
        passes: calls of the first bank.
        slots: experts that the cache has room for.
        slot_bytes: of the device for each.
        stall_s: seconds in which computing waited for experts.
        prefetched: experts that were brought in because they were expected.
        prefetch_hits: of them, those that were then asked for while they were there.
        on_cpu: experts that the processor computed where they wait, once a pass each.
        half_life: of what counts for staying in the cache, in tokens.
        token_requests, token_hits: of requests and hits, those of passes of single tokens.
    """

    banks: tuple[BankReport, ...]
    tokens: int
    passes: int
    slots: int
    slot_bytes: int
    stall_s: float
    prefetched: int
    prefetch_hits: int
    on_cpu: int
    half_life: float = 0.0
    token_requests: int = 0
    token_hits: int = 0

    @property
    def requests(self) -> int:
        """Experts that passes asked for."""
        return sum(bank.requests for bank in self.banks)

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts asked for that had stayed in the cache; None before the first pass."""
        return sum(bank.hits for bank in self.banks) / self.requests if self.requests else None

    @property
    def fetched_bytes(self) -> int:
        """Bytes that were brought in."""
        return sum(bank.fetched_bytes for bank in self.banks)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes brought in for each token; None before the first one."""
        return self.fetched_bytes / self.tokens if self.tokens else None
