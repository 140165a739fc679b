"""Finds out while a model runs whether something pays: passes with it and passes without it in turn, and the faster way for a while."""

from __future__ import annotations

from statistics import median

_WINDOW = 8
"""Passes of one way before the other one has its turn."""

_TURNS = 2
"""Of each way before they are compared; in turn, so that what else the machine does meets both."""

_KEEP = 512
"""Passes after which both are tried again: caches fill, texts change."""

_MOST_S = 60.0
"""A pass that took longer was interrupted by whoever calls the model."""


class Tryout:
    """One way of running passes and its opposite."""

    def __init__(self, first: bool = True) -> None:
        """Begin with a way.

        Args:
            first: the way to begin with, and to prefer where there is no difference.
        """
        self._first = first
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._passes = 0
        self._kept: bool | None = None

    @property
    def choice(self) -> bool:
        """How the next pass is to be run."""
        if self._kept is not None:
            return self._kept
        return self._first ^ bool(self._passes // _WINDOW % 2)

    def saw(self, seconds: float) -> None:
        """A pass by the present choice took so long."""
        if not 0 < seconds < _MOST_S:
            return
        # The first one of a window still has to do with the other way.
        if self._kept is None and self._passes % _WINDOW:
            self._seconds[self.choice].append(seconds)
        self._passes += 1
        if self._kept is None and self._passes >= 2 * _WINDOW * _TURNS:
            other = not self._first
            self._kept = other if median(self._seconds[other]) < median(self._seconds[self._first]) else self._first
            self._passes = 0
        elif self._kept is not None and self._passes >= _KEEP:
            self._kept, self._passes, self._seconds = None, 0, {True: [], False: []}
