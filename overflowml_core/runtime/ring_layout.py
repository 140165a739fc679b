"""What passes through a buffer of the pinned ring at a time, and where in it, so that it can be read straight from its file.

Note [pages first]. Direct reads want memory and file aligned alike, and a ring buffer is no larger than the largest block. So the whole
pages of each stretch of a file come first, one stretch behind the other, and the ends of less than a page behind them all: no byte is
lost to alignment, and copies bring each to its place in the slab. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from overflowml_core.runtime.chunks import DIRECT_ALIGNMENT_BYTES, LEAST_DIRECT_BYTES, Piece


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that go from a place in the ring buffer to one in the slab."""

    ring_offset: int
    slab_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Window:
    """One filling of a ring buffer: what to read into it (offsets in it), and the copies that empty it."""

    pieces: tuple[Piece, ...]
    copies: tuple[Copy, ...]


def windows_of(pieces: Sequence[Piece], window_bytes: int) -> Iterator[Window]:
    """Cut a block into windows, in file order, each but the last as full as whole pages of the file allow.

    Args:
        pieces: where the block lies in files, and where in the slab each piece goes.
        window_bytes: size of a ring buffer, at least one byte.
    """
    filling: list[Piece] = []
    room = window_bytes
    for whole in sorted((p for p in pieces if p.nbytes), key=lambda p: (str(p.path), p.file_offset)):
        piece = whole
        while piece.nbytes > room:
            nbytes = room - (piece.file_offset + room) % DIRECT_ALIGNMENT_BYTES if room >= LEAST_DIRECT_BYTES else room
            if nbytes:
                filling.append(Piece(piece.path, piece.file_offset, piece.buffer_offset, nbytes))
                piece = Piece(piece.path, piece.file_offset + nbytes, piece.buffer_offset + nbytes, piece.nbytes - nbytes)
            yield _window(filling)
            filling, room = [], window_bytes
        filling.append(piece)
        room -= piece.nbytes
    if filling:
        yield _window(filling)


def _window(parts: Sequence[Piece]) -> Window:
    """Lay parts, which are in file order, out in a ring buffer."""
    pages: list[Piece] = []
    tail: list[Piece] = []  # of the last stretch: right behind its pages it needs no copy of its own
    ends: list[Piece] = []
    for stretch in _stretches(parts):
        first = stretch[0].file_offset
        last = stretch[-1].file_offset + stretch[-1].nbytes
        page_first = -(-first // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES
        page_last = last // DIRECT_ALIGNMENT_BYTES * DIRECT_ALIGNMENT_BYTES
        if page_last - page_first < LEAST_DIRECT_BYTES:
            ends += stretch
            continue
        ends += tail
        tail = []
        for part in stretch:
            pages += _between(part, page_first, page_last)
            ends += _between(part, first, page_first)
            tail += _between(part, page_last, last)
    read: list[Piece] = []
    copies: list[Copy] = []
    at = 0
    for part in (*pages, *tail, *ends):
        read.append(Piece(part.path, part.file_offset, at, part.nbytes))
        before = copies[-1] if copies else None
        if before is not None and before.slab_offset + before.nbytes == part.buffer_offset:
            copies[-1] = Copy(before.ring_offset, before.slab_offset, before.nbytes + part.nbytes)
        else:
            copies.append(Copy(at, part.buffer_offset, part.nbytes))
        at += part.nbytes
    return Window(tuple(read), tuple(copies))


def _stretches(parts: Sequence[Piece]) -> Iterator[list[Piece]]:
    stretch: list[Piece] = []
    for part in parts:
        if stretch and (stretch[-1].path != part.path or stretch[-1].file_offset + stretch[-1].nbytes != part.file_offset):
            yield stretch
            stretch = []
        stretch.append(part)
    if stretch:
        yield stretch


def _between(part: Piece, first: int, last: int) -> Iterator[Piece]:
    """What of a part lies between two places of its file, if anything."""
    start, end = max(part.file_offset, first), min(part.file_offset + part.nbytes, last)
    if start < end:
        yield Piece(part.path, start, part.buffer_offset + start - part.file_offset, end - start)
