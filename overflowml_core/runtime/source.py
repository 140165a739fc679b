"""Reads weights: from files in as few calls as their layout allows, or from parameters that have data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.runtime.chunks import CHUNK_BYTES, Piece
from overflowml_core.runtime.encode import EncodedWeight
from overflowml_core.runtime.reader import IN_FLIGHT, FileReader
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.structure import TORCH_DTYPES

_WINDOW_BYTES = IN_FLIGHT * CHUNK_BYTES
"""Of what is read to be converted: enough to keep the disk busy."""


def is_stored_as_is(entry: Entry) -> bool:
    """Whether a weight lies in a file as a whole with the dtype in which it is used, so that it can be seen there."""
    return entry.origin is not None and is_straight(entry)


def is_straight(entry: Entry) -> bool:
    """Whether a weight lies in files with the dtype in which it is used, in one piece or in several: reading is all there is to do."""
    return bool(entry.origins) and all(TORCH_DTYPES.get(origin.dtype) is entry.dtype for origin in entry.origins)


def stored_as_is(slab: Slab) -> bool:
    """Whether every weight of the slab lies in a file as a whole with the dtype in which it is used."""
    return all(is_stored_as_is(entry) for entry in slab.entries)


def pieces_of(slab: Slab) -> list[Piece]:
    """What to read for a slab whose weights need no conversion."""
    return [piece for entry in slab.entries for piece in _pieces(entry, entry.offset_bytes)]


def _pieces(entry: Entry, offset_bytes: int) -> Iterator[Piece]:
    """What to read so that the weight, as its files have it, starts at an offset of the buffer."""
    for origin in entry.origins:
        yield Piece(origin.path, origin.offset_bytes, offset_bytes, origin.nbytes)
        offset_bytes += origin.nbytes


def fill(entries: Sequence[Entry], buffer: torch.Tensor, reader: FileReader, base_bytes: int = 0) -> None:
    """Bring weights into a byte buffer in RAM, cast where the file holds another dtype.

    Args:
        entries: what to bring.
        buffer: bytes on the CPU, at least up to the end of the last entry.
        reader: opens the files.
        base_bytes: offset in the slab of the buffer's first byte.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        PlanMismatch: a weight has neither data nor an origin.
    """
    straight: list[Piece] = []
    converted: list[Entry] = []
    for entry in entries:
        if is_straight(entry):
            straight += _pieces(entry, entry.offset_bytes - base_bytes)
        else:
            converted.append(entry)
    reader.read(straight, buffer)
    with torch.no_grad():
        # The parts of a weight stand side by side, so that one is converted once, and no two at a time.
        for _, parts in groupby(converted, key=lambda entry: id(entry.weight)):
            _bring(list(parts), reader, buffer, base_bytes)


def _bring(parts: Sequence[Entry], reader: FileReader, buffer: torch.Tensor, base_bytes: int) -> None:
    weight = parts[0].weight
    if isinstance(weight, EncodedWeight) and weight.is_due:
        made = weight.encode(values_of(weight.plain, reader))
        for entry in parts:
            entry.view(buffer, base_bytes).copy_(made[entry.path])
        weight.put_aside()
        return
    for entry in parts:
        target = entry.view(buffer, base_bytes)
        if entry.origins:
            _read_other_dtype(entry, reader, target)
        else:
            target.copy_(_present(entry))


def _present(entry: Entry) -> torch.Tensor:
    if entry.weight.parameter.is_meta:
        raise PlanMismatch(f"{entry.weight.name}: the weight has no data and no file holds it; load the model from a complete checkpoint")
    return entry.present()


def values_of(entry: Entry, reader: FileReader) -> torch.Tensor:
    """A weight by itself: what the model holds, or a tensor of its own with what is read, cast where the file holds another dtype.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        PlanMismatch: the weight has neither data nor an origin.
    """
    if not entry.origins:
        return _present(entry)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    fill([entry], buffer, reader, entry.offset_bytes)
    return entry.view(buffer, entry.offset_bytes)


def _read_other_dtype(entry: Entry, reader: FileReader, target: torch.Tensor) -> None:
    """Read a weight and convert it, a few pieces at a time, so that RAM never holds a second copy of it."""
    stored = entry.origins[0]
    dtype = TORCH_DTYPES.get(stored.dtype)
    if dtype is None:
        raise Unsupported(f"{stored.path}: dtype {stored.dtype} cannot be read into a torch tensor here; convert the checkpoint")
    flat = target.view(-1)
    for window in _windows(_pieces(entry, 0)):
        first, nbytes = window[0].buffer_offset, sum(piece.nbytes for piece in window)
        raw = torch.empty(nbytes, dtype=torch.uint8)
        reader.read([replace(piece, buffer_offset=piece.buffer_offset - first) for piece in window], raw)
        flat[first // dtype.itemsize : (first + nbytes) // dtype.itemsize].copy_(raw.view(dtype))


def _windows(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Cut what lies one behind the other into stretches of equal size."""
    window: list[Piece] = []
    room = _WINDOW_BYTES
    for piece in pieces:
        done = 0
        while done < piece.nbytes:
            nbytes = min(piece.nbytes - done, room)
            window.append(Piece(piece.path, piece.file_offset + done, piece.buffer_offset + done, nbytes))
            done, room = done + nbytes, room - nbytes
            if not room:
                yield window
                window, room = [], _WINDOW_BYTES
    if window:
        yield window


def windows(entries: Sequence[Entry], limit_bytes: int) -> Iterator[tuple[int, int, list[Entry]]]:
    """Cut a slab into stretches of whole weights.

    Yields:
        First and last byte (exclusive) of a stretch, and its entries; longer than the limit only where a single weight is.
    """
    pending: list[Entry] = []
    for entry in entries:
        is_next_part = bool(pending) and entry.weight is pending[-1].weight
        if pending and not is_next_part and entry.offset_bytes + entry.nbytes - pending[0].offset_bytes > limit_bytes:
            yield pending[0].offset_bytes, pending[-1].offset_bytes + pending[-1].nbytes, pending
            pending = []
        pending.append(entry)
    if pending:
        yield pending[0].offset_bytes, pending[-1].offset_bytes + pending[-1].nbytes, pending
