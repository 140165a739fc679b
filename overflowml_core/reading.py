"""How full one memory is at one moment, as a value. Knows nothing of how it was read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """One memory at one moment.

    Attributes:
        name: of the memory ("cuda:0", "ram").
        total_bytes: how large it is, or may become for this process.
        free_bytes: what nobody has taken, no other program either.
        held_bytes: what this process has taken, caches included.
    """

    name: str
    total_bytes: int
    free_bytes: int
    held_bytes: int

    @property
    def used_bytes(self) -> int:
        """What is taken, by whomever."""
        return self.total_bytes - self.free_bytes
