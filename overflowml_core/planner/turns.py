"""What is sent for behind which block where all streamed blocks are called in turn, pass after pass: the same in every pass of a cycle."""

from __future__ import annotations

from collections.abc import Sequence

from overflowml_core.staging import is_worth

Part = tuple[int, float]
"""A block, and the share of its bytes that is sent for."""

Row = tuple[tuple[Part, ...], ...]
"""Of one pass: per block, what is sent for when it is left."""


class Turns:
    """Rows of parts, worked out pass by pass until they repeat.

    Attributes:
        first: what is sent for before the first pass.
    """

    def __init__(self, sizes_bytes: Sequence[int], staging_bytes: int, *, in_parts: bool) -> None:
        """Fill the staging buffer.

        Args:
            sizes_bytes: of the streamed blocks, in the order in which they are called.
            staging_bytes: of the buffer.
            in_parts: a block may come in parts; else it is sent for as a whole.
        """
        self._sizes = sizes_bytes
        self._staging_bytes = staging_bytes
        self._in_parts = in_parts
        self._rows: list[Row] = []
        self._ahead: list[tuple[int, ...]] = []
        self._seen: dict[object, int] = {}
        self._cycle_from = 0
        self._sent = 0  # blocks of all passes that were sent for, and of the one that is being sent for its bytes and the first of them
        self._sent_bytes = 0
        self._start = -1
        self._end = 0
        self._waiting: list[
            tuple[int, int]
        ] = []  # first bytes and those behind the last, of blocks that were sent for and not called so far
        self.first: tuple[Part, ...]
        if sum(sizes_bytes) <= staging_bytes:  # every block has its slot and stays in it
            self.first = tuple((k, 1.0) for k in range(len(sizes_bytes)))
            self._rows, self._ahead, self._is_cyclic = [((),) * len(sizes_bytes)], [()], True
        elif len(set(sizes_bytes)) == 1:
            count, blocks = staging_bytes // sizes_bytes[0], len(sizes_bytes)
            self.first = tuple((k, 1.0) for k in range(count))
            self._rows = [tuple((((k + count) % blocks, 1.0),) for k in range(blocks))]
            self._ahead, self._is_cyclic = [tuple(range(count))], True
        else:
            self._is_cyclic = False
            self.first = self._send()

    def of_pass(self, number: int) -> Row:
        """What is sent for behind each block in a pass, counted from 0."""
        return self._rows[self._reached(number)]

    def ahead(self, number: int) -> tuple[int, ...]:
        """The blocks that are in the buffer or on their way there when a pass begins."""
        return self._ahead[self._reached(number)]

    def place_of(self, number: int) -> int:
        """Where a pass stands in the cycle: passes that stand alike are alike in all that follows."""
        return self._reached(number)

    def _reached(self, number: int) -> int:
        while not self._is_cyclic and len(self._rows) <= number:
            self._work_out()
        if number < len(self._rows):
            return number
        return self._cycle_from + (number - self._cycle_from) % (len(self._rows) - self._cycle_from)

    def _work_out(self) -> None:
        """One pass more, or the end of the cycle."""
        count = len(self._sizes)
        begun = len(self._rows) * count
        state = (self._sent - begun, self._sent_bytes, self._start, tuple(self._waiting))
        if state in self._seen:
            self._cycle_from, self._is_cyclic = self._seen[state], True
            return
        self._seen[state] = len(self._rows)
        ahead = self._sent + (self._sent_bytes > 0)
        self._ahead.append(tuple(k % count for k in range(begun, ahead)))
        row = []
        for _ in range(count):
            del self._waiting[0]
            row.append(self._send())
        self._rows.append(tuple(row))

    def _send(self) -> tuple[Part, ...]:
        """Send for blocks as far as their bytes are free of those that were not called so far: what ``behind`` and ``free_bytes`` of
        staging.py say, without a call for each, for a search asks a million times."""
        sizes, staging_bytes, waiting = self._sizes, self._staging_bytes, self._waiting
        found: list[Part] = []
        while True:
            k = self._sent % len(sizes)
            nbytes = sizes[k]
            start = self._start
            if start < 0:
                start = self._end if self._end + nbytes <= staging_bytes else 0
            first = end = start + nbytes
            for other_start, other_end in waiting:
                if other_start < first and start < other_end:
                    first = other_start if other_start > start else start
            free = first - start
            if free < nbytes and not (self._in_parts and is_worth(nbytes, self._sent_bytes, free)):
                return tuple(found)
            found.append((k, (free - self._sent_bytes) / nbytes))
            if free < nbytes:
                self._start, self._sent_bytes = start, free
                return tuple(found)
            self._start, self._sent_bytes = -1, 0
            self._sent += 1
            self._end = end
            waiting.append((start, end))
