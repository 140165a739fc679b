"""What the benchmark asks of the system: groups with a memory limit, counters of a process, the page cache. Knows nothing of models."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_REMOVE_TRIES = 50


@dataclass(frozen=True)
class Cage:
    """A control group whose processes share a memory limit, in which the pages of files that they read count, too.

    Attributes:
        folder: the group's.
        version: 1 or 2.
        limit_bytes: its limit.
    """

    folder: Path
    version: int
    limit_bytes: int

    def add(self, pid: int) -> None:
        """Have a process live in it from now on. What it took before stays with its old group.

        Raises:
            OSError: the kernel refuses.
        """
        (self.folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def peak_bytes(self) -> int | None:
        """Most that was ever taken in it, pages of files included; None on kernels that do not say."""
        try:
            return int((self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")).read_text("ascii"))
        except OSError:
            return None

    def remove(self) -> None:
        """Take it away. The kernel may take a moment to forget processes that have ended.

        Raises:
            OSError: a process lives in it still.
        """
        for left in reversed(range(_REMOVE_TRIES)):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                if not left:
                    raise
                time.sleep(0.1)


def make_cage(name: str, limit_bytes: int, root: Path = CGROUPS, own: str | None = None) -> Cage | None:
    """A new group with a memory limit and no swap, below this process's own where that may be; None where none can be made.

    Args:
        name: of the group; nothing of this name may exist.
        limit_bytes: of memory, pages of files included.
        root: where control groups are mounted.
        own: text of /proc/self/cgroup.
    """
    own = _read(Path("/proc/self/cgroup")) if own is None else own
    for parent, version in _parents(root, own):
        folder = parent / name
        try:
            if version == 2 and "memory" not in _read(parent / "cgroup.subtree_control").split():
                (parent / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
            folder.mkdir()
        except OSError:
            continue
        try:
            _limit(folder, version, limit_bytes)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        return Cage(folder, version, limit_bytes)
    return None


def _parents(root: Path, own: str) -> Iterable[tuple[Path, int]]:
    """Groups in which one may be made, the nearest first."""
    paths = dict(line.split(":", 2)[1:] for line in own.splitlines() if line.count(":") >= 2)
    if (root / "memory" / "memory.limit_in_bytes").exists():
        yield root / "memory" / paths.get("memory", "/").strip("/"), 1
        yield root / "memory", 1
    if "memory" in _read(root / "cgroup.controllers").split():
        mine = root / paths.get("", "/").strip("/")
        # A group of version 2 that has processes cannot have groups with limits below it, so the one above comes into question, too.
        yield from ((folder, 2) for folder in (mine, mine.parent, root) if folder.is_relative_to(root))


def _limit(folder: Path, version: int, limit_bytes: int) -> None:
    name, swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version == 1 else ("memory.max", "memory.swap.max")
    (folder / name).write_text(str(limit_bytes), encoding="ascii")
    with contextlib.suppress(OSError):  # a kernel that does not count swap has no such file
        if (folder / swap).exists():
            (folder / swap).write_text(str(limit_bytes) if version == 1 else "0", encoding="ascii")


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def drop_cache(files: Iterable[Path]) -> None:
    """Have the page cache forget these files. Pages that a process has mapped and touched stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not yet on the disk could not be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_bytes_of(pid: int) -> int | None:
    """Bytes that a process had the disk read since it began, page faults included; None where the system does not tell."""
    return _counter(_read(Path(f"/proc/{pid}/io")), "read_bytes")


def anonymous_bytes_of(pid: int | str = "self") -> int | None:
    """Memory of a process that no file stands behind, shared memory included; None where the system does not tell."""
    text = _read(Path(f"/proc/{pid}/status"))
    anonymous, shared = _counter(text, "RssAnon"), _counter(text, "RssShmem")
    return None if anonymous is None else (anonymous + (shared or 0)) * 1024


def available_bytes() -> int | None:
    """RAM that may be taken without swapping, for the whole machine."""
    found = _counter(_read(Path("/proc/meminfo")), "MemAvailable")
    return None if found is None else found * 1024


def _counter(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return None
