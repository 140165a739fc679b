"""The folder of kept slabs: finds, adds and evicts them, next to other processes that do the same. Imports no torch.

Three kinds of files, each named by the key of its slab:

- ``KEY.slab`` is whole and never written to again. Who uses it holds a shared lock on it; who evicts it must hold it alone.
- ``KEY.*.part`` is being written, under a shared lock of its writer. One whose lock is free was left by a writer that died.
- ``KEY.turn`` is locked by the process whose turn it is to make the slab. Nothing is right or wrong by it: it saves others the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overflowml_core.runtime.file_lock import Lock, share, take
from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, BadSlabFile, Header, check_slab, read_header, write_slab

_LOG = logging.getLogger("overflowml")

_SLAB, _PART, _TURN = ".slab", ".part", ".turn"
_OURS = re.compile(r"[0-9a-f]{64}\.")
_LONGEST_TURN_S = 120.0
"""After this long a process that waits for another one's slab makes its own."""
_POLL_S = 0.02
_LONGEST_EVICTION_S = 2.0
_STALE_PART_S = 3600.0
"""Where there are no locks, a file whose last change is longer ago is nobody's work any more."""
_DISK_SHARE = 4
_LEAST_FREE_BYTES = 4 * 2**30
_LEAST_FREE_SHARE = 20
_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_RENAMES_OPEN_FILES = sys.platform != "win32"


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept slab, open and locked against eviction until ``descriptor`` and its duplicates are closed."""

    path: Path
    header: Header
    descriptor: int


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of the folder as a list shows it: size in bytes, time of the last use in seconds, whether a process uses it now."""

    header: Header
    file_bytes: int
    used_s: float
    in_use: bool


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    file_bytes: int
    used_ns: int


class KeptFolder:
    """Kept slabs in one folder, under a cap."""

    def __init__(self, path: Path, cap_bytes: int | None = None) -> None:
        """Look at a folder, which may not exist yet.

        Args:
            path: the folder.
            cap_bytes: the most that all files may take; None for a quarter of the disk. Whatever it is, a twentieth of the disk, at
                most 4 GiB, stays free.
        """
        self.path = path
        self._cap_bytes = cap_bytes

    @property
    def cap_bytes(self) -> int:
        """The most that all files may take."""
        if self._cap_bytes is None:
            self._cap_bytes = shutil.disk_usage(_existing(self.path)).total // _DISK_SHARE
        return self._cap_bytes

    def open(self, key: str, nbytes: int) -> Kept | None:
        """A kept slab, None where there is none. One that is damaged is removed, with a warning.

        Args:
            key: of the slab.
            nbytes: of the slab; it is part of what the key stands for, and checked.
        """
        path = self.path / (key + _SLAB)
        try:
            descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("%s: cannot be read (%s); the weights are packed again", path, error)
            return None
        try:
            header = self._checked(path, descriptor, key, nbytes)
        except (BadSlabFile, OSError) as problem:
            os.close(descriptor)
            _LOG.warning("%s: %s; it is removed, and the weights are packed again", path, problem)
            _unlink(path)
            return None
        if header is None:
            os.close(descriptor)
            return None
        return Kept(path, header, descriptor)

    def _checked(self, path: Path, descriptor: int, key: str, nbytes: int) -> Header | None:
        if not _is_shared(descriptor):
            return None  # evicted meanwhile
        self._check_owner(descriptor)
        header = read_header(descriptor)
        if (header.key, header.nbytes) != (key, nbytes):
            raise BadSlabFile("it holds another slab than its name says")
        if os.fstat(descriptor).st_mtime_ns != header.written_s * 10**9:
            # Somebody wrote to it, or copied it here: what else costs nothing is not enough.
            check_slab(descriptor, header)
        _touch(path, header.written_s)
        return header

    def _check_owner(self, descriptor: int) -> None:
        """Refuse what another user may have put into a folder that many can write to."""
        if sys.platform == "win32":
            return
        owner = os.fstat(descriptor).st_uid
        if owner not in (0, os.geteuid(), self.path.stat().st_uid):
            raise BadSlabFile(f"it belongs to user {owner}")

    @contextlib.contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """Wait while another process makes this slab, for two minutes at most. Look for it again afterwards."""
        path = self.path / (key + _TURN)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        except OSError:  # who cannot write here hears of it from what is to be written
            yield
            return
        try:
            given_up = time.monotonic() + _LONGEST_TURN_S
            while take(descriptor) is Lock.BUSY and time.monotonic() < given_up:
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)
            _unlink(path)

    def new_part(self, key: str) -> Part:
        """A file to write a slab into; close it, whatever happens.

        Raises:
            OSError: the folder cannot be written.
        """
        while True:
            descriptor, name = tempfile.mkstemp(dir=self.path, prefix=key + ".", suffix=_PART)
            share(descriptor)
            if os.fstat(descriptor).st_nlink or not _RENAMES_OPEN_FILES:
                return Part(self, key, Path(name), descriptor)
            os.close(descriptor)  # somebody cleaned up before it was locked

    # ---- room

    def has_room(self, nbytes: int) -> bool:
        """Whether a slab may be kept, after evicting those that were not used for longest and are not in use."""
        needed = nbytes + SLAB_OFFSET_BYTES
        if needed > self.cap_bytes:
            return False
        self.clean()
        found = sorted(self._found(_SLAB), key=lambda f: f.used_ns)
        held = sum(f.file_bytes for f in found) + sum(f.file_bytes for f in self._found(_PART))
        usage = shutil.disk_usage(self.path)
        spare = min(self.cap_bytes - held, usage.free - min(_LEAST_FREE_BYTES, usage.total // _LEAST_FREE_SHARE))
        for file in found:
            if spare >= needed:
                break
            if _evicted(file.path):
                spare += file.file_bytes
        return spare >= needed

    def clean(self) -> None:
        """Remove what dead writers left."""
        for file in (*self._found(_PART), *self._found(_TURN)):
            _evicted(file.path, _STALE_PART_S)

    def clear(self) -> tuple[int, int]:
        """Remove all that no process uses; returns how many slabs went, and how many bytes."""
        self.clean()
        gone = [file.file_bytes for file in self._found(_SLAB) if _evicted(file.path)]
        return len(gone), sum(gone)

    def listed(self) -> list[Listed]:
        """What is kept, the latest used first; files that are no kept slabs are left out."""
        return [made for file in sorted(self._found(_SLAB), key=lambda f: -f.used_ns) if (made := _listed(file)) is not None]

    def _found(self, suffix: str) -> list[_Found]:
        found: list[_Found] = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        status = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(suffix) and _OURS.match(entry.name) and stat.S_ISREG(status.st_mode):
                            found.append(_Found(Path(entry.path), status.st_size, status.st_atime_ns))
        except FileNotFoundError:
            return []
        return found


class Part:
    """A slab that is being written: whole under its name afterwards, or gone."""

    def __init__(self, folder: KeptFolder, key: str, path: Path, descriptor: int) -> None:
        self._folder, self._key, self._path = folder, key, path
        self._descriptor: int | None = descriptor
        self._is_kept = False

    def keep(self, header: Header, slab: memoryview) -> Kept | None:
        """Write it whole and give it its name. May be called again after an error, and no more once it is kept.

        Returns:
            The slab; None where it is not there any more, as it may happen where there are no locks.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        if self._descriptor is None:
            return None
        os.ftruncate(self._descriptor, 0)
        write_slab(self._descriptor, header, slab)
        _touch(self._path, header.written_s)
        target = self._folder.path / (self._key + _SLAB)
        descriptor, self._descriptor = self._descriptor, None
        if not _RENAMES_OPEN_FILES:
            os.close(descriptor)
            os.replace(self._path, target)
            self._is_kept = True
            return self._folder.open(self._key, header.nbytes)
        try:
            os.replace(self._path, target)
        except FileNotFoundError:  # cleaned up by somebody who saw no lock
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        self._is_kept = True
        return Kept(target, header, descriptor)

    def close(self) -> None:
        """Remove what was not kept. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if not self._is_kept:
            _unlink(self._path)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _is_shared(descriptor: int) -> bool:
    """Lock a slab for use; False where it was evicted before that."""
    given_up = time.monotonic() + _LONGEST_EVICTION_S
    while share(descriptor) is Lock.BUSY:
        if time.monotonic() > given_up:
            return False
        time.sleep(_POLL_S)
    return os.fstat(descriptor).st_nlink > 0 or not _RENAMES_OPEN_FILES


def _touch(path: Path, written_s: int) -> None:
    """Note the use in the time of access, which is what eviction goes by, and leave the time of the last change as the header has it."""
    try:
        os.utime(path, ns=(time.time_ns(), written_s * 10**9))
    except OSError as error:  # a folder that is read-only has no order of use
        _LOG.debug("%s: %s", path, error)


def _evicted(path: Path, stale_s: float = 0.0) -> bool:
    """Remove a file that nobody uses; where no lock can tell, one that was not changed for so long."""
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        return False
    try:
        lock = take(descriptor)
        if lock is Lock.BUSY or (lock is Lock.NONE and time.time() - os.fstat(descriptor).st_mtime < stale_s):
            return False
        if _RENAMES_OPEN_FILES:
            return _unlink(path)
    finally:
        os.close(descriptor)
    return _unlink(path)


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _LOG.debug("%s: %s", path, error)
        return False
    return True


def _listed(file: _Found) -> Listed | None:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | _FLAGS)
    except OSError:
        return None
    try:
        header = read_header(descriptor)
        # Whoever looks for this slab meanwhile waits for us, and does not take it for evicted.
        in_use = take(descriptor) is Lock.BUSY
    except (BadSlabFile, OSError):
        return None
    finally:
        os.close(descriptor)
    return Listed(header, file.file_bytes, file.used_ns / 1e9, in_use)
