"""Reads exact ranges of files, large ones with several reads in flight."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from overflowml_core.errors import ReadFault
from overflowml_core.runtime.chunks import Chunk, Piece, chunks_of
from overflowml_core.runtime.jobs import Job, Workers
from overflowml_core.runtime.open_file import OpenFile

IN_FLIGHT = 4
"""Reads under way at a time. Some disks are busy with one; network disks and NVMe drives want several."""


class FileReader:
    """Open files and the threads that read them. Reads asked for from several threads are served in the order in which they came, so that
    the disk goes from one to the next without a pause."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, OpenFile] = {}
        self._workers: Workers | None = None
        self.bytes_read = 0

    def read(self, pieces: Sequence[Piece], buffer: torch.Tensor) -> None:
        """Read pieces into a byte buffer in RAM; neighbours in a file are one call, as far as a call goes.

        Raises:
            ReadFault: a file is gone, unreadable or shorter than it was.
            FileChanged: somebody wrote to a file after it was opened; what was read is of no use.
        """
        memory = memoryview(buffer.numpy())
        chunks = chunks_of(pieces, buffer.data_ptr())
        files = {chunk.path: self._file(chunk.path, chunk.file_offset, chunk.nbytes) for chunk in chunks}
        if len(chunks) < 2:
            _read_all(deque(chunks), files, memory)
        else:
            self._read_in_parallel(deque(chunks), files, memory)
        for file in files.values():
            file.check()
        with self._lock:
            self.bytes_read += sum(chunk.nbytes for chunk in chunks)

    def _read_in_parallel(self, chunks: deque[Chunk], files: dict[Path, OpenFile], memory: memoryview) -> None:
        count = min(IN_FLIGHT, len(chunks))
        workers, jobs = self._threads(), [Job(partial(_read_all, chunks, files, memory)) for _ in range(count)]
        try:
            for job in jobs:
                workers.submit(job)
            for job in jobs:
                job.wait()
        finally:
            # An interrupt must not leave threads behind that write into memory which is somebody else's by then.
            chunks.clear()
            for job in jobs:
                job.wait()
        error = next((job.error for job in jobs if job.error is not None), None)
        if error is not None:
            raise error

    def _threads(self) -> Workers:
        with self._lock:
            if self._workers is None:
                self._workers = Workers(IN_FLIGHT, "overflowml-read")
            return self._workers

    def _file(self, path: Path, offset: int, wanted: int) -> OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                try:
                    file = self._files[path] = OpenFile(path)
                except OSError as error:
                    raise ReadFault(path, offset, wanted, 0, str(error)) from error
            return file

    def hold(self, pieces: Iterable[Piece]) -> None:
        """Open the files of pieces now, so that they are read as they are now, whatever takes their place before the first read.

        Raises:
            ReadFault: a file is gone or unreadable.
        """
        for piece in pieces:
            self._file(piece.path, piece.file_offset, piece.nbytes)

    def status(self, path: Path) -> os.stat_result:
        """What the system says of a file as this reader reads it, which need not be the file that has its name by now.

        Raises:
            ReadFault: it is gone or unreadable.
        """
        return self._file(path, 0, 0).status()

    def reads_direct(self, path: Path) -> bool:
        """Whether large reads of a file can bypass the page cache.

        Raises:
            ReadFault: it is gone or unreadable.
        """
        return self._file(path, 0, 0).reads_direct

    def adopt(self, path: Path, descriptor: int) -> None:
        """Read this path through a descriptor that the caller opened; it is duplicated."""
        with self._lock:
            self._files[path] = OpenFile(path, descriptor)

    def close(self) -> None:
        """Let the threads end and close all files. A second call does nothing."""
        with self._lock:
            workers, self._workers = self._workers, None
            files, self._files = self._files, {}
        if workers is not None:
            workers.close()
        for file in files.values():
            file.close()

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read_all(chunks: deque[Chunk], files: dict[Path, OpenFile], memory: memoryview) -> None:
    """Read chunks until none is left; several threads share the work of one read."""
    try:
        while True:
            try:
                chunk = chunks.popleft()
            except IndexError:
                return
            views = [memory[offset : offset + nbytes] for offset, nbytes in chunk.places]
            files[chunk.path].read(views, chunk.file_offset, chunk.is_direct)
    except BaseException:
        chunks.clear()
        raise
