"""Files of a model on each node, once: as they lie there already, or fetched from the driver's machine into the cache folder.

Note [once]. Workers of a node take turns by a lock of the operating system: the first one fetches, the others find what it fetched. A
folder gets its name once all of its files are whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overflowml_ray.errors import SetAside

Read = Callable[[str, int, int], bytes]
"""Reads from a file of the driver's folder: its name, the first byte, and how many."""
_SMALL_BYTES = 2**20
_PIECE_BYTES = 32 * 2**20
_LONGEST_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder's files: names, sizes in bytes, and digests of small files and of both ends of large ones."""

    files: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """Of a folder.

        Raises:
            OSError: a file cannot be read.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return cls(tuple((path.relative_to(folder).as_posix(), path.stat().st_size, _ends(path)) for path in paths))

    @property
    def name(self) -> str:
        """A digest of all of it. Times do not count: copies have others."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()[:32]


def on_this_node(folder: Path, wanted: Listing, cache: Path, read: Read) -> Path:
    """Where the files are on this node.

    Args:
        folder: where they are on the driver's machine.
        wanted: what is in it there.
        cache: where fetched ones are kept.
        read: of the driver.

    Raises:
        SetAside: they cannot be kept here.
    """
    try:
        if folder.is_dir() and Listing.of(folder) == wanted:
            return folder
        target = cache / "models" / wanted.name
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(target.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(lock)
            if not target.is_dir() or Listing.of(target) != wanted:
                _fetch(target, wanted, read)
        finally:
            os.close(lock)
    except OSError as error:
        raise SetAside(f"the model's files cannot be kept there ({error.strerror or error})", whole_node=True) from error
    return target


def _wait(lock: int) -> None:
    from overflowml_core.runtime.file_lock import Lock, take

    start_s = time.monotonic()
    while take(lock) is Lock.BUSY and time.monotonic() - start_s < _LONGEST_S:
        time.sleep(0.2)


def _fetch(target: Path, wanted: Listing, read: Read) -> None:
    part = target.with_suffix(".part")
    for left in (part, target):
        shutil.rmtree(left, ignore_errors=True)
    try:
        for name, size_bytes, _ in wanted.files:
            path = part / name
            if not path.resolve().is_relative_to(part.resolve()):
                raise SetAside(f"{name}: no name of a file in a model's folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                for first in range(0, size_bytes, _PIECE_BYTES):
                    stream.write(read(name, first, min(_PIECE_BYTES, size_bytes - first)))
        if Listing.of(part) != wanted:
            raise SetAside("the model's files changed while they were fetched")
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class Library:
    """Serves the files of one folder; runs on the driver's machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, first: int, count: int) -> bytes:
        """Bytes of a file."""
        with (self.folder / name).open("rb") as stream:
            stream.seek(first)
            return stream.read(count)


def _ends(path: Path) -> str:
    seen, size_bytes = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        seen.update(stream.read(_SMALL_BYTES))
        if size_bytes > _SMALL_BYTES:
            stream.seek(max(_SMALL_BYTES, size_bytes - _SMALL_BYTES))
            seen.update(stream.read(_SMALL_BYTES))
    return seen.hexdigest()[:32]
