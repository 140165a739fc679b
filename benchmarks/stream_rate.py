"""How fast files can be read from the disk, past the page cache where the system allows it. Knows nothing of models.

The engine measures its disk by itself; this is a second opinion that shares no code with it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from stream_system import drop_cache

CHUNK_BYTES = 16 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)


def read_rate(files: Sequence[Path], in_flight: int, chunk_bytes: int = CHUNK_BYTES) -> float:
    """Bytes a second of reading all of these files once, front to back.

    Args:
        files: not empty; a remainder of less than a chunk at a file's end is left out where the file is longer than a chunk.
        in_flight: so many reads are under way at any time.
        chunk_bytes: of one read, a multiple of the file system's blocks.

    Raises:
        OSError: a file cannot be read.
    """
    drop_cache(files)
    descriptors = [_open(file) for file in files]
    try:
        work = [
            (descriptor, offset)
            for descriptor, file in zip(descriptors, files, strict=True)
            for offset in range(0, max(file.stat().st_size // chunk_bytes, 1) * chunk_bytes, chunk_bytes)
        ]
        readers = [_Reader(work[number::in_flight], chunk_bytes) for number in range(in_flight)]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        seconds = time.perf_counter() - began
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for reader in readers:
        if reader.error is not None:
            raise reader.error
    return sum(reader.done_bytes for reader in readers) / seconds


class _Reader(threading.Thread):
    """Reads its share of the chunks into one buffer of its own."""

    def __init__(self, work: Sequence[tuple[int, int]], chunk_bytes: int) -> None:
        super().__init__(daemon=True)
        self._work = work
        # Starts at a page, as direct reads need it. Private, for shared memory has no huge pages; with those fewer are locked.
        self._buffer = mmap.mmap(-1, chunk_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffer[::4096] = b"\0" * len(range(0, chunk_bytes, 4096))  # no page faults while the clock runs
        self.done_bytes = 0
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            for descriptor, offset in self._work:
                self.done_bytes += os.preadv(descriptor, [self._buffer], offset)
        except OSError as error:
            self.error = error
        finally:
            self._buffer.close()


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | _DIRECT)
    except OSError:
        return os.open(file, os.O_RDONLY)  # no direct reads here; the cache was dropped before
