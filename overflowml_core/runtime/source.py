"""Reads weights: from files in as few calls as their layout allows, or from parameters that have data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.loading import Origin
from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.encode import EncodedWeight
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.structure import TORCH_DTYPES


def is_stored_as_is(entry: Entry) -> bool:
    """Whether a weight lies in a file with the dtype in which it is used, so that reading is all there is to do."""
    return entry.origin is not None and TORCH_DTYPES.get(entry.origin.dtype) is entry.dtype


def stored_as_is(slab: Slab) -> bool:
    """Whether every weight of the slab lies in a file with the dtype in which it is used."""
    return all(is_stored_as_is(entry) for entry in slab.entries)


def pieces_of(slab: Slab) -> list[Piece]:
    """What to read for a slab that is stored as it is."""
    return [
        Piece(entry.origin.path, entry.origin.offset_bytes, entry.offset_bytes, entry.nbytes)
        for entry in slab.entries
        if entry.origin is not None
    ]


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
        if entry.origin is not None and is_stored_as_is(entry):
            straight.append(Piece(entry.origin.path, entry.origin.offset_bytes, entry.offset_bytes - base_bytes, entry.nbytes))
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
        target.copy_(_read_other_dtype(entry.origin, reader) if entry.origin is not None else _present(entry))


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
    if entry.origin is None:
        return _present(entry)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    fill([entry], buffer, reader, entry.offset_bytes)
    return entry.view(buffer, entry.offset_bytes)


def _read_other_dtype(origin: Origin, reader: FileReader) -> torch.Tensor:
    dtype = TORCH_DTYPES.get(origin.dtype)
    if dtype is None:
        raise Unsupported(f"{origin.path}: dtype {origin.dtype} cannot be read into a torch tensor here; convert the checkpoint")
    raw = torch.empty(origin.nbytes, dtype=torch.uint8)
    reader.read([Piece(origin.path, origin.offset_bytes, 0, origin.nbytes)], raw)
    return raw.view(dtype).view(origin.shape)


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
