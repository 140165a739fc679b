"""Where streamed blocks lie in the staging buffer of a device: one behind the other, round and round. Pure arithmetic, shared by the
planner's simulation and the runtime's streamer.

Note [round and round]. A block lies behind the one that was called before it; where it would cross the end of the buffer it starts again
at 0. Its copy overwrites whatever lay there, as soon as that was computed with. Places follow from the order of the calls alone, so blocks
that are called in a circle come back to the same few places: the blocks that begin at 0 repeat after no more passes than the buffer holds
blocks. Blocks of one size have slots side by side, and none is wasted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

PARTS = 8
"""A block comes in so many parts at most: what is freed first is overwritten first, where it is worth a copy of its own."""


class Place(NamedTuple):
    """A slot: the bytes of a block in the staging buffer.

    Attributes:
        start: its first byte.
        end: the byte behind its last.
        left: the byte from which on the end of the buffer was left empty before it, for it would have crossed it.
    """

    start: int
    end: int
    left: int

    def overwrites(self, other: Place, sent_bytes: int, upto_bytes: int) -> bool:
        """Whether the bytes of a block from ``sent_bytes`` to ``upto_bytes`` go where another one lies. The first also put an end to what
        lies where the buffer is left empty: it would stay for another round, and blocks would have other places in every pass."""
        if other.start < self.start + upto_bytes and self.start + sent_bytes < other.end:
            return True
        return not sent_bytes and other.end > self.left


def behind(end: int, nbytes: int, staging_bytes: int) -> Place:
    """The place of a block behind another one.

    Args:
        end: the byte behind the block before it.
        nbytes: of the block.
        staging_bytes: of the buffer.
    """
    if end + nbytes <= staging_bytes:
        return Place(end, end + nbytes, staging_bytes)
    return Place(0, nbytes, end)


def free_bytes(place: Place, taken: Iterable[Place]) -> int:
    """How many bytes from its beginning a place has before the first that another one takes."""
    first = place.end
    for other in taken:
        if other.start < first and place.start < other.end and other.start < other.end:
            first = max(other.start, place.start)
    return first - place.start


def is_worth(nbytes: int, sent: int, free: int) -> bool:
    """Whether to send for a part of a block of which so many bytes were sent for, and so many could be by now."""
    return free >= nbytes or (free - sent) * PARTS >= nbytes


def window_sums(sizes_bytes: Sequence[int], most_bytes: int) -> Iterator[int]:
    """Bytes of consecutive blocks, from each one on as many as a buffer may hold: sizes of a buffer that blocks fill to its end at times.

    Args:
        sizes_bytes: of blocks that follow one another in a circle.
        most_bytes: of a buffer; fewer than all of them take.
    """
    count, last, total = len(sizes_bytes), 0, 0
    for first in range(count):
        while total + sizes_bytes[last % count] <= most_bytes:
            total += sizes_bytes[last % count]
            last += 1
        if last > first:
            yield total
            total -= sizes_bytes[first]
        else:
            last = first + 1


def fitting(sizes_bytes: Sequence[int], most_bytes: int) -> int:
    """The size in bytes of a staging buffer that uses a room best: no byte more than consecutive blocks take; 0 where one does not fit.

    Args:
        sizes_bytes: of the streamed blocks, in the order in which they are called.
        most_bytes: the room.
    """
    if not sizes_bytes or max(sizes_bytes) > most_bytes:
        return 0
    if sum(sizes_bytes) <= most_bytes:
        return sum(sizes_bytes)
    return max(window_sums(sizes_bytes, most_bytes))


def likewise(sizes_bytes: Sequence[int], staging_bytes: int, others_bytes: Sequence[int]) -> int:
    """The size in bytes of a staging buffer that holds as many blocks at a time when these have other sizes.

    Args:
        sizes_bytes: of the streamed blocks as planned, none larger than the buffer.
        staging_bytes: of the buffer as planned.
        others_bytes: what each takes instead.
    """
    if sum(sizes_bytes) <= staging_bytes:
        return sum(others_bytes)
    most = end = other_end = k = 0
    begun: set[int] = set()
    while True:
        place = behind(end, sizes_bytes[k], staging_bytes)
        end = place.end
        if place.start == 0:
            if k in begun:
                return most
            begun.add(k)
            other_end = 0
        other_end += others_bytes[k]
        most = max(most, other_end)
        k = (k + 1) % len(sizes_bytes)
