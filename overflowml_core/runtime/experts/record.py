"""The bytes of single experts: how they lie in a record, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from overflowml_core.layout import slab_offsets
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.chunks import DIRECT_ALIGNMENT_BYTES, Piece
from overflowml_core.runtime.experts.bank import Bank
from overflowml_core.runtime.slab import Entry, Slab, contiguous_stride
from overflowml_core.runtime.structure import Unit

SPARE_BYTES = 2 * DIRECT_ALIGNMENT_BYTES
"""Of a slot in RAM beyond a record, so that whole pages around it in its file can be read straight into it."""


def records_of(bank: Bank, loading: Loading | None) -> list[Slab]:
    """The slab of each expert of a bank.

    Args:
        bank: which experts.
        loading: knows where weights without data are to be read; None where all have data.
    """
    sizes_bytes = bank.tensor_bytes
    offsets, nbytes = slab_offsets(sizes_bytes)
    unit = Unit(bank.name, None, bank.weights)
    sources = [_shares(_pieces(weight.parameter, loading), bank.count if bank.is_stacked else 1) for weight in bank.weights]
    slabs: list[Slab] = []
    for expert in range(bank.count):
        entries: list[Entry] = []
        for place, weight in enumerate(bank.weights_of(expert)):
            number = place if bank.is_stacked else expert * len(bank.attributes) + place
            shares = sources[number]
            share = (shares[expert if bank.is_stacked else 0]) if shares else ()
            shape = tuple(weight.parameter.shape[1:] if bank.is_stacked else weight.parameter.shape)
            whole = replace(share[0], shape=shape) if len(share) == 1 else None
            stride = contiguous_stride(shape)
            entry = Entry(weight, offsets[place], sizes_bytes[place], shape, stride, weight.parameter.dtype, whole)
            entries.append(entry if whole is not None or not share else replace(entry, scattered=tuple(share)))
        slabs.append(Slab(unit, tuple(entries), nbytes))
    return slabs


def _pieces(parameter: object, loading: Loading | None) -> tuple[Origin, ...]:
    return loading.pieces_of(parameter) if loading is not None else ()


def _shares(pieces: Sequence[Origin], count: int) -> list[tuple[Origin, ...]]:
    """Pieces that stand one behind the other, cut into equal shares of bytes; none where there are no pieces."""
    if not pieces:
        return []
    ends = list(accumulate(piece.nbytes for piece in pieces))
    size = ends[-1] // count
    shares: list[tuple[Origin, ...]] = []
    index = 0
    for number in range(count):
        first, last = number * size, (number + 1) * size
        share: list[Origin] = []
        while first < last:
            piece, end = pieces[index], ends[index]
            nbytes = min(end, last) - first
            offset = piece.offset_bytes + piece.nbytes - (end - first)
            share.append(Origin(piece.path, offset, nbytes, piece.dtype, _shape_of(piece, nbytes)))
            first += nbytes
            index += first == end
        shares.append(tuple(share))
    return shares


def _shape_of(piece: Origin, nbytes: int) -> tuple[int, ...]:
    if nbytes == piece.nbytes:
        return piece.shape
    elements = 1
    for size in piece.shape:
        elements *= size
    return (elements * nbytes // piece.nbytes,)


def as_in_file(slab: Slab, file_bytes: int) -> tuple[Slab, Piece] | None:
    """A record as its file has it, and the whole pages that hold it there: one read past the page cache, straight into a slot.

    Args:
        slab: with all entries in one stretch of one file, in any order.
        file_bytes: size of that file.

    Returns:
        None where it is spread out, or not on multiples of its element sizes.
    """
    placed = [(index, entry.origin, entry) for index, entry in enumerate(slab.entries)]
    origins = [origin for _, origin, _ in placed if origin is not None]
    if len(origins) < len(placed) or len({origin.path for origin in origins}) != 1:
        return None
    first = min(origin.offset_bytes for origin in origins)
    end = max(origin.offset_bytes + origin.nbytes for origin in origins)
    start = first // DIRECT_ALIGNMENT_BYTES * DIRECT_ALIGNMENT_BYTES
    # The last page of a file is seldom whole; its end is read as it is.
    stop = min(-(-end // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES, file_bytes)
    if end - first > slab.nbytes or any(o.offset_bytes % e.dtype.itemsize for _, o, e in placed if o is not None):
        return None
    entries = tuple(replace(entry, offset_bytes=origin.offset_bytes - start) for _, origin, entry in placed if origin is not None)
    return replace(slab, entries=entries, nbytes=stop - start), Piece(origins[0].path, start, 0, stop - start)


def stacked_view(buffer: torch.Tensor, record_bytes: int, entry: Entry, count: int) -> torch.Tensor:
    """A tensor of all records, seen through them as the stack that it stands for.

    Args:
        buffer: bytes of ``count`` records, each of ``record_bytes``.
        record_bytes: from one to the next.
        entry: of the first record.
        count: records.
    """
    flat = buffer.view(entry.dtype)
    step = record_bytes // entry.dtype.itemsize
    start = flat.storage_offset() + entry.offset_bytes // entry.dtype.itemsize
    return torch.as_strided(flat, (count, *entry.shape), (step, *entry.stride), start)
