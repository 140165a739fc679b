"""Packed weights on disk, for blocks that no file holds in the form in which they are used.

A slab whose weights all come from files is kept under a key of what it is made from, and the next load finds it. A slab of weights that
live in memory alone goes to a temporary file without a name: nobody can take it for another model's, and it is gone when the last
handle closes, even after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import torch

from overflowml_core import environment
from overflowml_core.errors import OverflowmlError
from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, Header, Seal, write_whole_buffer
from overflowml_core.runtime.kept_folder import Kept, KeptFolder
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab_content import Content
from overflowml_core.units import format_bytes

_log = logging.getLogger("overflowml")
_T = TypeVar("_T")

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Packed:
    """A slab on disk.

    Attributes:
        piece: where it is read.
        view: its bytes, mapped copy-on-write: writing to them changes no file. A kept slab is not evicted while this lives.
        seal: holds it against its checksum when it is first read; None where it was written by this process for itself.
    """

    piece: Piece
    view: torch.Tensor
    seal: Seal | None = None


class PackedStore:
    """Slabs in one folder: kept ones in files of their own, all others one after the other in a file without a name."""

    def __init__(self, folder: Path, reader: FileReader, cap_bytes: int | None = None) -> None:
        """Open a store.

        Args:
            folder: where the files lie; made if it is missing, for this user alone.
            reader: what reads them.
            cap_bytes: the most that kept slabs may take; by default what the environment says, or a quarter of the disk.

        Raises:
            OverflowmlError: there is no such folder, and it cannot be made.
        """
        self.folder = folder
        self._reader = reader
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self._refused(0, error) from error
        self._kept = KeptFolder(folder, environment.cache_size_bytes() if cap_bytes is None else cap_bytes)
        self._nameless: IO[bytes] | None = None
        self._nameless_path = folder / f"packed-{os.getpid()}-{id(self)}"
        self._nameless_bytes = 0
        self._is_told = False
        self.nbytes = 0
        """Bytes of all slabs that were asked for."""

    def slab(self, nbytes: int, make: Callable[[torch.Tensor], None], content: Content | None = None) -> Packed:
        """A slab on disk: the kept one if there is one, else made anew. RAM holds one slab meanwhile.

        Args:
            nbytes: of the slab, more than none.
            make: fills a buffer of so many zero bytes.
            content: what the slab is made from; None where nothing says that, so that it is not kept.

        Raises:
            OverflowmlError: the folder cannot be written, or the disk is full.
            ReadFault: of ``make``.
        """
        self.nbytes += nbytes
        if content is None or not self._kept.cap_bytes:
            self._nameless_file(nbytes)  # what cannot be written need not be made
            return self._without_name(_made(nbytes, make))
        kept = self._kept.open(content.key, nbytes)
        if kept is None:
            with self._kept.turn(content.key):
                kept = self._kept.open(content.key, nbytes)
                if kept is None:
                    return self._new(nbytes, make, content)
        return self._opened(kept)

    def _new(self, nbytes: int, make: Callable[[torch.Tensor], None], content: Content) -> Packed:
        try:
            part = self._kept.new_part(content.key)
        except OSError as error:
            raise self._refused(nbytes, error) from error
        with contextlib.closing(part):
            slab = _made(nbytes, make)
            kept = None
            # A key must not outlive what it stands for: what was read may be older or newer than a file that changed meanwhile.
            if content.holds_in(self._reader) and self._has_room(nbytes):
                data = memoryview(slab.numpy())
                header = Header(content.key, nbytes, zlib.crc32(data), int(time.time()) // 2 * 2, content.title)
                kept = self._write(lambda: part.keep(header, data), nbytes)
        return self._opened(kept) if kept is not None else self._without_name(slab)

    def _write(self, write: Callable[[], _T], nbytes: int) -> _T:
        """Write, and once more after kept slabs made room on a full disk."""
        try:
            try:
                return write()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                count, gone_bytes = self._kept.clear()
                if not count:
                    raise
            _log.warning("%s: the disk is full; %d kept slabs (%s) are removed", self.folder, count, format_bytes(gone_bytes))
            return write()
        except OSError as error:
            raise self._refused(nbytes, error) from error

    def _has_room(self, nbytes: int) -> bool:
        if self._kept.has_room(nbytes):
            return True
        if not self._is_told:
            self._is_told = True
            _log.warning(
                "%s: packed weights are not kept beyond %s, or what is left of the disk; the next load packs the rest again. "
                "Set OVERFLOWML_CACHE_SIZE, or OVERFLOWML_CACHE to a folder with more room",
                self.folder,
                format_bytes(self._kept.cap_bytes),
            )
        return False

    def _opened(self, kept: Kept) -> Packed:
        header = kept.header
        piece = Piece(kept.path, SLAB_OFFSET_BYTES, 0, header.nbytes)
        try:
            self._reader.hold([piece])
            # The map holds a duplicate of the descriptor, and with it the lock.
            view = self._mapped(kept.descriptor, SLAB_OFFSET_BYTES, header.nbytes, kept.path)
        finally:
            os.close(kept.descriptor)
        return Packed(piece, view, Seal(kept.path, header.nbytes, header.crc32))

    def _without_name(self, slab: torch.Tensor) -> Packed:
        descriptor, start = self._nameless_file(slab.numel()), self._nameless_bytes

        def write() -> None:
            os.lseek(descriptor, start, os.SEEK_SET)
            write_whole_buffer(descriptor, memoryview(slab.numpy()))

        self._write(write, slab.numel())
        # Direct reads and maps start on a page.
        self._nameless_bytes += -(-slab.numel() // SLAB_OFFSET_BYTES) * SLAB_OFFSET_BYTES
        piece = Piece(self._nameless_path, start, 0, slab.numel())
        return Packed(piece, self._mapped(descriptor, start, slab.numel(), self.folder))

    def _nameless_file(self, nbytes: int) -> int:
        if self._nameless is None:
            try:
                self._nameless = tempfile.TemporaryFile(dir=self.folder, prefix="packed-", buffering=0)  # noqa: SIM115 -- lives with the store
            except OSError as error:
                raise self._refused(nbytes, error) from error
            self._reader.adopt(self._nameless_path, self._nameless.fileno())
        return self._nameless.fileno()

    def _mapped(self, descriptor: int, offset: int, nbytes: int, path: Path) -> torch.Tensor:
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            memory = mmap.mmap(descriptor, offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than that
            remedy = "raise the limit of open files (ulimit -n)" if getattr(error, "errno", 0) == errno.EMFILE else "load the model again"
            raise OverflowmlError(f"{path}: {nbytes} bytes at offset {offset} cannot be mapped into memory ({error}); {remedy}") from error
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset - start)

    def close(self) -> None:
        """Let the file without a name go. Maps of slabs live on. A second call does nothing."""
        if self._nameless is not None:
            self._nameless.close()

    def _refused(self, nbytes: int, error: OSError) -> OverflowmlError:
        if error.errno not in _FULL:
            return OverflowmlError(
                f"{self.folder}: cannot hold packed weights ({error}); set OVERFLOWML_CACHE to a folder that you can write to"
            )
        return OverflowmlError(
            f"{self.folder}: no room for {format_bytes(nbytes)} more of packed weights ({error}); "
            "free space, or set OVERFLOWML_CACHE to a folder with room"
        )


def _made(nbytes: int, make: Callable[[torch.Tensor], None]) -> torch.Tensor:
    # Zeros: what lies between the weights goes into a file, and must not be what this process had in memory before.
    slab = torch.zeros(nbytes, dtype=torch.uint8)
    make(slab)
    return slab
