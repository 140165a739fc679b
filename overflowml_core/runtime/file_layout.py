"""How a block lies in a staging slot in RAM so that it can be read straight from its file, past the page cache.

Note [as the file has it]. Direct reads want memory and file aligned alike. A slab starts each weight on a boundary of its own, a file has
them one behind the other after a header of any length, so the two hardly ever agree. A slot in RAM need not be a slab, though: no copy
engine moves it as a whole. So each stretch of the file goes to a place that is as far behind a page as it is in the file, which costs
less than a page a stretch. The weights then lie as in the file that a host would map; results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from overflowml_core.loading import Origin
from overflowml_core.runtime.chunks import DIRECT_ALIGNMENT_BYTES, LEAST_DIRECT_BYTES, Piece
from overflowml_core.runtime.slab import Entry, Slab


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A slab whose weights lie as in their files, and what to read for it. ``slab.nbytes`` is what it takes, gaps included."""

    slab: Slab
    pieces: tuple[Piece, ...]


def as_in_file(slab: Slab) -> FileLayout | None:
    """Lay a slab out as its files have it.

    Returns:
        None where that is impossible (a weight lies in no file, or on no multiple of its element size) or gains nothing (it is small).
    """
    if slab.nbytes < LEAST_DIRECT_BYTES:
        return None
    offsets: dict[int, int] = {}
    pieces: list[Piece] = []
    end = 0
    for stretch in _stretches(slab.entries):
        first, last = stretch[0][1], max((origin.offset_bytes + origin.nbytes for _, origin, _ in stretch), default=0)
        start = end + (first.offset_bytes - end) % DIRECT_ALIGNMENT_BYTES
        for index, origin, itemsize in stretch:
            if origin.offset_bytes % itemsize:
                return None
            offsets[index] = start + origin.offset_bytes - first.offset_bytes
        pieces.append(Piece(first.path, first.offset_bytes, start, last - first.offset_bytes))
        end = start + last - first.offset_bytes
    if len(offsets) + sum(not entry.nbytes for entry in slab.entries) < len(slab.entries):
        return None
    entries = tuple(replace(entry, offset_bytes=offsets.get(index, 0)) for index, entry in enumerate(slab.entries))
    return FileLayout(replace(slab, entries=entries, nbytes=end), tuple(pieces))


_Placed = tuple[int, Origin, int]
"""Index of an entry, where it lies, and its element size in bytes."""


def _stretches(entries: Sequence[Entry]) -> Iterator[list[_Placed]]:
    """Weights in file order; those with less than a page between them are read together, for apart they would take more."""
    placed = sorted(
        ((index, entry.origin, entry.dtype.itemsize) for index, entry in enumerate(entries) if entry.origin is not None and entry.nbytes),
        key=lambda part: (str(part[1].path), part[1].offset_bytes),
    )
    stretch: list[_Placed] = []
    end = 0
    for part in placed:
        origin = part[1]
        if stretch and (stretch[0][1].path != origin.path or origin.offset_bytes - end >= DIRECT_ALIGNMENT_BYTES):
            yield stretch
            stretch = []
        end = origin.offset_bytes + origin.nbytes if not stretch else max(end, origin.offset_bytes + origin.nbytes)
        stretch.append(part)
    if stretch:
        yield stretch
