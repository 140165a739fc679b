"""Measures how fast a disk reads in sequence, past the page cache where the system allows it. Knows nothing of models."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger("overflowml")

CHUNK_BYTES = 16 * 2**20
"""One read. From about 4 MiB on, larger reads of one thread are no faster on NVMe drives; blocks of models are larger still."""
FREE_SHARE = 10
"""At most a tenth of the free space is written."""
_LEAST_BYTES = 4 * CHUNK_BYTES
_DIRECT = getattr(os, "O_DIRECT", 0)
_F_NOCACHE = 48  # fcntl.h of macOS: reads of this descriptor stay out of the page cache


def disk_read_rate(folder: Path, nbytes: int) -> float:
    """Sequential reads of a temporary file in a folder, in bytes a second: the median over its parts.

    The file is removed at once where the system lets an open file go (POSIX), in any case before this returns.

    Args:
        folder: made where it is missing.
        nbytes: size of the file, less where little space is free.

    Raises:
        OSError: the folder cannot be written, or has less than 640 MiB free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = min(nbytes, shutil.disk_usage(folder).free // FREE_SHARE) // CHUNK_BYTES * CHUNK_BYTES
    if size < _LEAST_BYTES:
        raise OSError(errno.ENOSPC, f"less than {FREE_SHARE * _LEAST_BYTES} bytes are free", str(folder))
    # Whole pages at an aligned address, as direct reads need them.
    with mmap.mmap(-1, CHUNK_BYTES) as buffer, _file(folder, size, buffer) as descriptor:
        return statistics.median(_rates(descriptor, size, buffer))


@contextlib.contextmanager
def _file(folder: Path, size: int, buffer: mmap.mmap) -> Iterator[int]:
    """A descriptor for reading a new file that is on the disk and, where possible, not in the page cache."""
    writer, name = tempfile.mkstemp(dir=folder, prefix=".overflowml-", suffix=".tmp")
    reader = -1
    try:
        try:
            buffer[:] = os.urandom(CHUNK_BYTES)  # a file system that compresses or merges zeros must find nothing to gain
            for index in range(size // CHUNK_BYTES):
                buffer[:8] = index.to_bytes(8, "little")
                _write(writer, buffer)
            os.fsync(writer)
            _drop_cache(writer)
        finally:
            os.close(writer)
        reader = _open(name)
        if os.name == "posix":
            os.unlink(name)
        yield reader
    finally:
        if reader >= 0:
            os.close(reader)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _write(descriptor: int, buffer: mmap.mmap) -> None:
    view = memoryview(buffer)
    try:
        done = 0
        while done < len(view):
            done += os.write(descriptor, view[done:])
    finally:
        view.release()


def _open(name: str) -> int:
    """For direct reads where the file system has them; tmpfs and some network file systems refuse."""
    plain = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    if _DIRECT:
        try:
            return os.open(name, plain | _DIRECT)
        except OSError as error:
            _log.info("%s: no direct reads here (%s); the page cache may make the disk look faster than it is", name, error)
    descriptor = os.open(name, plain)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    return descriptor


def _drop_cache(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _rates(descriptor: int, size: int, buffer: mmap.mmap) -> list[float]:
    """Bytes a second of each eighth of the file, or of each chunk of a small one."""
    part = max(CHUNK_BYTES, size // 8 // CHUNK_BYTES * CHUNK_BYTES)
    rates = []
    for start in range(0, size - part + 1, part):
        began = time.perf_counter()
        for offset in range(start, start + part, CHUNK_BYTES):
            _read(descriptor, offset, buffer)
        rates.append(part / max(time.perf_counter() - began, 1e-9))
    return rates


def _read(descriptor: int, offset: int, buffer: mmap.mmap) -> None:
    if hasattr(os, "preadv"):
        got = os.preadv(descriptor, [buffer], offset)
    else:
        os.lseek(descriptor, offset, os.SEEK_SET)
        got = len(os.read(descriptor, CHUNK_BYTES))
    if got != CHUNK_BYTES:
        raise OSError(errno.EIO, f"read {got} of {CHUNK_BYTES} bytes at offset {offset}")
