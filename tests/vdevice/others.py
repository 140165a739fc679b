"""Device memory that several processes share: a ledger in a file, changed under its lock. Knows neither torch nor a device."""

from __future__ import annotations

import fcntl
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Side = Literal["ours", "theirs"]
_LAYOUT = struct.Struct("<qqq")
"""Bytes of the device, and what each side holds of them."""
_PLACES: dict[Side, int] = {"ours": 1, "theirs": 2}


class Ledger:
    """What two programs hold of one device. Whoever dies with the lock gives it back: it is one of the operating system.

    Args:
        path: of the file, made by the first one.
        total_bytes: of the device; None opens a file that is there.
    """

    def __init__(self, path: Path, total_bytes: int | None = None) -> None:
        if total_bytes is not None:
            path.write_bytes(_LAYOUT.pack(total_bytes, 0, 0))
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), _LAYOUT.size)

    @contextmanager
    def _locked(self) -> Iterator[list[int]]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            values = list(_LAYOUT.unpack(self._map[:]))
            yield values
            self._map[:] = _LAYOUT.pack(*values)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def read(self) -> tuple[int, int, int]:
        """Bytes of the device, ours, theirs."""
        with self._locked() as values:
            return values[0], values[1], values[2]

    def take(self, side: Side, nbytes: int) -> bool:
        """Take all of them for a side, or nothing; False where they are not free."""
        with self._locked() as values:
            if nbytes > values[0] - values[1] - values[2]:
                return False
            values[_PLACES[side]] += nbytes
            return True

    def take_most(self, side: Side, nbytes: int, granule_bytes: int) -> int:
        """Take as many whole granules of them as are free; says how many bytes that were."""
        with self._locked() as values:
            free_bytes = values[0] - values[1] - values[2]
            taken_bytes = max(0, min(nbytes, free_bytes) // granule_bytes * granule_bytes)
            values[_PLACES[side]] += taken_bytes
            return taken_bytes

    def give(self, side: Side, nbytes: int) -> None:
        """Give so many bytes of a side back."""
        with self._locked() as values:
            values[_PLACES[side]] -= nbytes

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        self._file.close()
