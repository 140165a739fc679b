"""Says how large the next batch is, by what happened to those before. Runs nothing and knows no memory."""

from __future__ import annotations

_GROWS_AFTER = 2
"""Batches of a size that must succeed before a larger one is tried."""
_FORGETS_AFTER = 8
"""Batches that must succeed before a size that failed is tried again: whoever took the memory may have gone."""


class BatchSizer:
    """Halves on a failure, doubles after successes, and stays below a size that failed until that is long ago.

    Args:
        first: items of the first batch.
        largest: items of any batch, at most.
    """

    def __init__(self, first: int, largest: int) -> None:
        self.largest = largest
        self.size = max(1, min(first, largest))
        self._failed_size: int | None = None
        self._since_growth = 0
        self._since_failure = 0

    def failed(self, count: int) -> None:
        """Memory ran out in a batch of so many items."""
        self._failed_size = count if self._failed_size is None else min(self._failed_size, count)
        self.size = max(1, min(self.size, count // 2))
        self._since_growth = self._since_failure = 0

    def succeeded(self, count: int) -> None:
        """A batch of so many items was done. A last one that is smaller than it might be teaches nothing."""
        if count < self.size:
            return
        self._since_growth += 1
        self._since_failure += 1
        if self._since_failure >= _FORGETS_AFTER:
            self._failed_size = None
        if self._since_growth >= _GROWS_AFTER:
            below = self.largest if self._failed_size is None else self._failed_size - 1
            grown = max(1, min(2 * self.size, self.largest, below))
            if grown > self.size:
                self.size, self._since_growth = grown, 0

    def cap(self, most: int) -> None:
        """Let the next batch have so many items at most, whatever the successes say."""
        self.size = max(1, min(self.size, most))
