"""What running passes were measured to take, as frozen values. Knows nothing of how they were measured or what follows from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockTime:
    """One block in one pass: its dotted path in the component, seconds that it computed in all of its calls, and how many they were."""

    block: str
    compute_s: float
    calls: int


@dataclass(frozen=True, slots=True)
class MeasuredPass:
    """One kind of pass over a component under one plan: the median of several. Rates are 0 where nothing was moved that way.

    Attributes:
        component: whose pass.
        passes: how many were measured.
        pass_s: from its beginning to its end, as computed.
        outside_s: of it, what neither a block computed nor a block was waited for.
        stall_s: of it, what blocks were waited for.
        blocks: those that were called.
        h2d_bytes_per_s, pageable_h2d_bytes_per_s: copies of whole blocks from pinned and from pageable RAM.
        disk_bytes_per_s: reads of whole blocks.
    """

    component: str
    passes: int
    pass_s: float
    outside_s: float
    stall_s: float
    blocks: tuple[BlockTime, ...]
    h2d_bytes_per_s: float = 0.0
    pageable_h2d_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of computing, in blocks and outside them."""
        return self.outside_s + sum(block.compute_s for block in self.blocks)
