"""One bank of experts among those of a phase."""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.runtime.experts.bank_home import BankHome
from overflowml_core.runtime.experts.foresight import Foresight
from overflowml_core.runtime.experts.record import SPARE_BYTES


@dataclass(slots=True)
class Seat:
    """One bank in a phase.

    Attributes:
        home: of the bank.
        first: number of its first expert among those of all banks.
        foresight: expects its experts; None where it has no router that can be asked.
        version: of its weights, when the cache last held what they are.
        adds_by_expert: outputs are added up as the eager implementations do.
    """

    home: BankHome
    first: int
    foresight: Foresight | None
    version: int = 0
    adds_by_expert: bool = False

    @property
    def numbers(self) -> range:
        """Of its experts among those of all banks."""
        return range(self.first, self.first + self.home.bank.count)


def slot_bytes(record_bytes: int, on_host: bool) -> int:
    """What a slot of a cache takes for records of this size."""
    return record_bytes + (SPARE_BYTES if on_host else 0)
