"""One file of weights, open for reading: past the page cache where the system allows it, and only while it is what it was."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import threading
import weakref
from pathlib import Path

from overflowml_core.errors import FileChanged, ReadFault
from overflowml_core.runtime.chunks import LEAST_DIRECT_BYTES

_log = logging.getLogger("overflowml")
_PLAIN = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)
_F_NOCACHE = 48  # fcntl.h of macOS: reads of this descriptor stay out of the page cache
_NOT_HERE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""How file systems refuse direct reads: tmpfs when the file is opened, some when it is read, some for an alignment of theirs."""


class OpenFile:
    """Descriptors of one file. They stay open, so that a file that is replaced is still read as it was; one that is written to or cut
    is an error. Every method may be called from any thread."""

    def __init__(self, path: Path, adopted: int | None = None) -> None:
        """Open a file, or take another descriptor of it.

        Args:
            path: where it is; a name for messages where a descriptor is adopted.
            adopted: a descriptor of the caller's, which is duplicated; its file may still grow and is not watched for changes.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._plain = os.open(path, _PLAIN) if adopted is None else os.dup(adopted)
        descriptors = [self._plain]
        # Reads under way hold this object, so that no descriptor is closed below them when a model is dropped.
        self._close = weakref.finalize(self, _close_all, descriptors)
        self._before = os.fstat(self._plain) if adopted is None else None
        # A file of a few pages is not worth a second descriptor; an adopted one may still grow.
        worthwhile = self._before is None or self._before.st_size >= LEAST_DIRECT_BYTES
        self._direct = _open_past_cache(self._plain, path) if worthwhile else -1
        if self._direct >= 0:
            descriptors.append(self._direct)
        self._seeking = threading.Lock()

    @property
    def reads_direct(self) -> bool:
        """Whether reads can bypass the page cache, as far as is known."""
        return self._direct >= 0

    def status(self) -> os.stat_result:
        """What the system says of the file."""
        return os.fstat(self._plain)

    def check(self) -> None:
        """Make sure that nobody wrote to the file since it was opened.

        Raises:
            FileChanged: its size or the time of its last change is another.
        """
        if self._before is None:
            return
        now = self.status()
        if (now.st_size, now.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            raise FileChanged(self.path, (self._before.st_size, self._before.st_mtime_ns), (now.st_size, now.st_mtime_ns))

    def read(self, views: list[memoryview], offset: int, direct: bool) -> None:
        """Fill views, one after the other, with the bytes from an offset on.

        Args:
            views: where to; the list is used up.
            offset: in the file, in bytes.
            direct: bypass the page cache where that can be done; offset, addresses and lengths are aligned for it.

        Raises:
            ReadFault: the file ends before, or the system cannot read it.
        """
        wanted = sum(len(view) for view in views)
        done = 0
        while views:
            past_cache = direct and self._direct >= 0
            try:
                got = self._some(views, offset + done, self._direct if past_cache else self._plain)
            except OSError as error:
                if not past_cache or error.errno not in _NOT_HERE:
                    raise ReadFault(self.path, offset, wanted, done, str(error)) from error
                _log.info("%s: no direct reads here (%s); the page cache is used", self.path, error)
                self._direct = -1  # closed with the others, for another thread may be reading through it
                continue
            if got <= 0:
                raise ReadFault(self.path, offset, wanted, done, "the file ends there")
            done += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]
                direct = False  # what is left is no longer aligned

    def _some(self, views: list[memoryview], offset: int, descriptor: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, views, offset)
        # Windows has no positioned reads: seek and read are one step.
        with self._seeking, io.FileIO(descriptor, closefd=False) as file:
            file.seek(offset)
            return file.readinto(views[0])  # type: ignore[return-value]

    def close(self) -> None:
        """Close the file, which nobody reads any more. A second call does nothing."""
        self._close()


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _open_past_cache(descriptor: int, path: Path) -> int:
    """A second descriptor of the very same file for reads that leave the page cache alone, -1 where there is none."""
    if not _DIRECT and sys.platform != "darwin":
        return -1
    # By number, where the system has that: the path may lead to another file by now, or to none.
    by_number = f"/proc/self/fd/{descriptor}"
    source = by_number if os.path.exists(by_number) else path
    try:
        second = os.open(source, _PLAIN | _DIRECT)
    except OSError as error:
        _log.info("%s: no direct reads here (%s); the page cache is used", path, error)
        return -1
    if not os.path.sameopenfile(descriptor, second):
        os.close(second)
        return -1
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(second, _F_NOCACHE, 1)
    return second
