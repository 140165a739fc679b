"""Packed weights on disk, for blocks that no file holds in the form in which they are used.

The store is a temporary file without a name: nobody can take it for another model's, and it is gone when the last handle
closes, even after a crash.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch

from overflowml_core.errors import OverflowmlError
from overflowml_core.runtime.source import FileReader, Piece
from overflowml_core.units import format_bytes


class PackedStore:
    """Slabs one after the other in a file of its own."""

    def __init__(self, folder: Path) -> None:
        """Open an empty store.

        Args:
            folder: where the file lies; made if it is missing.

        Raises:
            OverflowmlError: the folder cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="packed-")  # noqa: SIM115 -- lives with the store
        except OSError as error:
            raise OverflowmlError(f"{folder}: cannot hold packed weights ({error}); set OVERFLOWML_CACHE to a folder with room") from error
        self.path = folder / f"packed-{os.getpid()}-{id(self)}"
        """A name for messages and for the reader; the file itself has none."""
        self.nbytes = 0

    def append(self, slab: torch.Tensor) -> Piece:
        """Write the bytes of a slab; returns where they are.

        Raises:
            OverflowmlError: the disk is full.
        """
        piece = Piece(self.path, self.nbytes, 0, slab.numel())
        try:
            self._file.seek(self.nbytes)
            self._file.write(memoryview(slab.numpy()))
            self._file.flush()
        except OSError as error:
            raise OverflowmlError(
                f"{self.folder}: no room for {format_bytes(slab.numel())} more of packed weights ({error}); "
                "free space, or set OVERFLOWML_CACHE to a folder with room"
            ) from error
        self.nbytes += slab.numel()
        return piece

    def mapped(self, piece: Piece) -> torch.Tensor:
        """The bytes of a slab that was appended and is not empty, mapped copy-on-write: writing to them changes no file."""
        return torch.from_numpy(np.memmap(self._file, dtype=np.uint8, mode="c", offset=piece.file_offset, shape=(piece.nbytes,)))

    def open_in(self, reader: FileReader) -> None:
        """Let a reader find the store under its path."""
        reader.adopt(self.path, self._file.fileno())

    def close(self) -> None:
        """Let the file go. A second call does nothing."""
        self._file.close()
