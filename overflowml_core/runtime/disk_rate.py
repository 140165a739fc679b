"""Measures how fast a disk reads in sequence, in the way in which blocks are read: past the page cache where the system allows it, with
several reads in flight. Knows nothing of models."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from overflowml_core.runtime.chunks import CHUNK_BYTES
from overflowml_core.runtime.pages import private_pages
from overflowml_core.runtime.reader import IN_FLIGHT

_log = logging.getLogger("overflowml")

FREE_SHARE = 10
"""At most a tenth of the free space is written."""
_LEAST_BYTES = 64 * 2**20
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
        return statistics.median(_rates([(descriptor, offset) for offset in range(0, size, CHUNK_BYTES)]))


def files_read_rate(files: Sequence[Path], nbytes: int) -> float:
    """Reads of files that are there, from their beginnings, in bytes a second: the median over the parts of what is read.

    A disk may be another than that of the cache folder, and hold old files faster or slower than a new one.

    Args:
        files: on one disk.
        nbytes: of them that are read at most.

    Raises:
        OSError: one cannot be read, or together they are shorter than 64 MiB.
    """
    with contextlib.ExitStack() as stack:
        chunks: list[tuple[int, int]] = []
        for file in files:
            count = min(file.stat().st_size, nbytes - len(chunks) * CHUNK_BYTES) // CHUNK_BYTES
            if count > 0:
                descriptor = _open(str(file))
                stack.callback(os.close, descriptor)
                if not _is_direct(descriptor):
                    _drop_cache(descriptor)
                chunks += [(descriptor, number * CHUNK_BYTES) for number in range(count)]
        if len(chunks) * CHUNK_BYTES < _LEAST_BYTES:
            raise OSError(errno.EINVAL, f"shorter than {_LEAST_BYTES} bytes", str(files[0]) if files else "no file")
        return statistics.median(_rates(chunks))


def _is_direct(descriptor: int) -> bool:
    if not _DIRECT:
        return False
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


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


def _rates(chunks: Sequence[tuple[int, int]]) -> list[float]:
    """Bytes a second of each eighth of chunks of descriptors at offsets, by the times at which they were there."""
    # Windows has no positioned reads: seeks of several threads would cross.
    count = IN_FLIGHT if hasattr(os, "preadv") else 1
    with contextlib.ExitStack() as stack:
        # Such memory as weights are read into: reads into small pages, or shared ones, took twice as long.
        buffers = [stack.enter_context(private_pages(CHUNK_BYTES)) for _ in range(count)]
        for buffer in buffers:
            buffer[:: mmap.PAGESIZE] = bytes(len(range(0, CHUNK_BYTES, mmap.PAGESIZE)))  # no page faults while the clock runs
        waiting = deque(chunks)
        began = time.perf_counter()
        with ThreadPoolExecutor(count, thread_name_prefix="overflowml-disk") as pool:
            jobs = [pool.submit(_read_all, waiting, buffer) for buffer in buffers]
        done_s = sorted(moment - began for job in jobs for moment in job.result())
    part = max(count, len(done_s) // 8)
    ends_s = [0.0, *done_s[part - 1 :: part]]
    return [part * CHUNK_BYTES / max(end - start, 1e-9) for start, end in itertools.pairwise(ends_s)]


def _read_all(waiting: deque[tuple[int, int]], buffer: mmap.mmap) -> list[float]:
    """Read chunks until none is left; returns when each was there."""
    done_s: list[float] = []
    while waiting:
        try:
            descriptor, offset = waiting.popleft()
        except IndexError:  # another thread took the last one
            break
        _read(descriptor, offset, buffer)
        done_s.append(time.perf_counter())
    return done_s


def _read(descriptor: int, offset: int, buffer: mmap.mmap) -> None:
    if hasattr(os, "preadv"):
        got = os.preadv(descriptor, [buffer], offset)
    else:
        os.lseek(descriptor, offset, os.SEEK_SET)
        got = len(os.read(descriptor, CHUNK_BYTES))
    if got != CHUNK_BYTES:
        raise OSError(errno.EIO, f"read {got} of {CHUNK_BYTES} bytes at offset {offset}")
