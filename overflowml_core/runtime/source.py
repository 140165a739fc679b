"""Reads weights: from files in as few calls as their layout allows, or from parameters that have data."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from overflowml_core.errors import PlanMismatch, ReadFault, Unsupported
from overflowml_core.loading import Origin
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.structure import TORCH_DTYPES

_LARGEST_GATHER = 512
"""Buffers of one vectored read; POSIX promises at least 16 (IOV_MAX), Linux takes 1024."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file and where in a buffer they go. All in bytes."""

    path: Path
    file_offset: int
    buffer_offset: int
    nbytes: int


class FileReader:
    """Reads exact ranges of files. Descriptors stay open, so a file that is replaced meanwhile is still read as it was;
    one that is cut is an error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        # A model may be dropped without being given back; its files must not stay open then.
        weakref.finalize(self, _close_all, self._descriptors)
        self.bytes_read = 0

    def read(self, pieces: Sequence[Piece], buffer: torch.Tensor) -> None:
        """Read pieces into a byte buffer in RAM; neighbours in a file are one call.

        Raises:
            ReadFault: a file is gone, unreadable or shorter than it was.
        """
        memory = memoryview(buffer.numpy())
        for run in _runs(pieces):
            views = [memory[p.buffer_offset : p.buffer_offset + p.nbytes] for p in run]
            self._read_run(run[0].path, run[0].file_offset, views)

    def _read_run(self, path: Path, offset: int, views: list[memoryview]) -> None:
        wanted = sum(len(view) for view in views)
        descriptor = self._descriptor(path, offset, wanted)
        done = 0
        while views:
            try:
                got = _vectored_read(descriptor, views, offset + done)
            except OSError as error:
                raise ReadFault(path, offset, wanted, done, str(error)) from error
            if got <= 0:
                raise ReadFault(path, offset, wanted, done, "the file ends there")
            done += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]
        with self._lock:
            self.bytes_read += wanted

    def _descriptor(self, path: Path, offset: int, wanted: int) -> int:
        with self._lock:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                try:
                    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise ReadFault(path, offset, wanted, 0, str(error)) from error
                self._descriptors[path] = descriptor
            return descriptor

    def hold(self, pieces: Sequence[Piece]) -> None:
        """Open the files of pieces now, so that they are read as they are now, whatever takes their place before the first read.

        Raises:
            ReadFault: a file is gone or unreadable.
        """
        for piece in pieces:
            self._descriptor(piece.path, piece.file_offset, piece.nbytes)

    def adopt(self, path: Path, descriptor: int) -> None:
        """Read this path through a descriptor that the caller opened; it is duplicated."""
        with self._lock:
            self._descriptors[path] = os.dup(descriptor)

    def close(self) -> None:
        """Close all files. A second call does nothing."""
        with self._lock:
            _close_all(self._descriptors)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _vectored_read(descriptor: int, views: list[memoryview], offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, views[:_LARGEST_GATHER], offset)
    # Windows has no positioned read; the single reader thread makes seek and read one step.
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(views[0]))
    views[0][: len(data)] = data
    return len(data)


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in file order, those that touch each other together."""
    runs: list[list[Piece]] = []
    for piece in sorted((p for p in pieces if p.nbytes), key=lambda p: (str(p.path), p.file_offset)):
        last = runs[-1][-1] if runs else None
        if last is not None and last.path == piece.path and last.file_offset + last.nbytes == piece.file_offset:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


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
        for entry in converted:
            _bring(entry, reader, entry.view(buffer, base_bytes))


def _bring(entry: Entry, reader: FileReader, target: torch.Tensor) -> None:
    if entry.origin is not None:
        target.copy_(_read_other_dtype(entry.origin, reader))
        return
    parameter = entry.weight.parameter
    if parameter.is_meta:
        raise PlanMismatch(f"{entry.weight.name}: the weight has no data and no file holds it; load the model from a complete checkpoint")
    target.copy_(parameter.detach())


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
        if pending and entry.offset_bytes + entry.nbytes - pending[0].offset_bytes > limit_bytes:
            yield pending[0].offset_bytes, pending[-1].offset_bytes + pending[-1].nbytes, pending
            pending = []
        pending.append(entry)
    if pending:
        yield pending[0].offset_bytes, pending[-1].offset_bytes + pending[-1].nbytes, pending


def cut(pieces: Sequence[Piece], first: int, last: int) -> list[Piece]:
    """The parts of pieces whose place in the buffer lies between two bytes, moved so that ``first`` becomes byte 0."""
    parts: list[Piece] = []
    for piece in pieces:
        start, end = max(piece.buffer_offset, first), min(piece.buffer_offset + piece.nbytes, last)
        if start < end:
            parts.append(Piece(piece.path, piece.file_offset + start - piece.buffer_offset, start - first, end - start))
    return parts
