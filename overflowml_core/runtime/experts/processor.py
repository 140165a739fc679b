"""Which of the missed experts the processor computes where they wait, while the others are copied to the device.

Note [division]. Copies and processor work side by side, so an expert goes to whichever is done with it first. The processor reads each
expert once a pass at the rate of its kernels; with more than a few tokens it computes longer than it reads, and copying pays (ik_llama.cpp,
pull request 520: below 32 tokens times all experts over those of a token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_TOKENS = 32
"""Times all experts over those of a token: passes of more tokens copy experts; see note [division]."""

_WEIGHT = 0.1
"""Of the newest measurement in the rate of the processor."""


class Division:
    """Divides experts between link and processor."""

    def __init__(self, link_bytes_per_s: float, cpu_bytes_per_s: float) -> None:
        """Go by these rates until something was measured.

        Args:
            link_bytes_per_s: of copies to the device.
            cpu_bytes_per_s: of the processor's kernels; 0 leaves it out.
        """
        self._link = link_bytes_per_s
        self._cpu = cpu_bytes_per_s

    @property
    def is_possible(self) -> bool:
        """Whether both rates are known."""
        return self._link > 0 and self._cpu > 0

    def saw(self, nbytes: int, seconds: float) -> None:
        """The processor took so long for an expert."""
        if seconds > 0:
            self._cpu += _WEIGHT * (nbytes / seconds - self._cpu)

    def for_processor(
        self, missed: Sequence[int], given: Mapping[int, int], expert_bytes: int, per_token: int, count: int, tokens: int
    ) -> list[int]:
        """The experts that the processor shall compute.

        Args:
            missed: experts that are not on the device.
            given: by expert, how many tokens it is given.
            expert_bytes: of one.
            per_token: experts that a token is routed to.
            count: experts of the bank.
            tokens: of the pass.
        """
        if not self.is_possible or tokens * per_token > MOST_TOKENS * count:
            return []
        copy_s, link_s, cpu_s = expert_bytes / self._link, 0.0, 0.0
        chosen: list[int] = []
        # Those with many tokens first: they are what the device is good at.
        for expert in sorted(missed, key=lambda e: -given[e]):
            compute_s = expert_bytes / self._cpu * max(1, given[expert])
            if cpu_s + compute_s < link_s + copy_s:
                chosen.append(expert)
                cpu_s += compute_s
            else:
                link_s += copy_s
        return chosen
