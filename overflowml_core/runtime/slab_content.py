"""What a packed slab is made from, as a key: the same key never stands for other bytes. Knows neither the store nor its folder.

Note [When is a file the same?]

Reading all of a model to see that it did not change would cost what keeping its slabs shall save. A file counts as the same while the
system reports the same inode, size, time of the last change of its content (mtime) and time of the last change of any kind (ctime), and
its first 64 KiB and both ends of each range that is used are the same bytes. Programs can set mtime back, as ``cp -p`` and ``rsync -t``
do; none can set ctime. Two changes within a tick of the clock have the same ctime: of a file that changed less than two seconds ago all
bytes that are used go into the key. The file is looked at through the descriptor that it is read through, before and after, so that a
name that was given to another file meanwhile is not taken for it. Windows has no ctime: there whoever changes the middle of a file and
then sets its mtime back is not found out.

Where the file lies and what it is called does not count.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.encode import recipe_of, sources_of
from overflowml_core.runtime.kept_file import SCHEMA, Title
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Slab

CAST = "cast"
"""The recipe of slabs whose weights are those of the file, in the dtype in which they are used."""

_SAMPLE_BYTES = 64 * 2**10
_WINDOW_BYTES = 16 * 2**20
_SETTLED_NS = 2 * 10**9
"""FAT counts mtime in steps of two seconds; every other clock of a file system is finer."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Content:
    """What a slab is made from.

    Attributes:
        key: digest of everything that its bytes depend on, 64 hexadecimal digits.
        title: for people.
        stamps: the files, and what the system said of them.
    """

    key: str
    title: Title
    stamps: tuple[tuple[Path, _Stamp], ...]

    def holds_in(self, reader: FileReader) -> bool:
        """Whether the files are still what the key stands for, after they were read."""
        return all(_stamp(reader, path) == stamp for path, stamp in self.stamps)


def content_of(slab: Slab, reader: FileReader, recipe: str | None = None) -> Content | None:
    """What a slab is made from; None where a weight of it lies in no file, so that nothing says what it is.

    Args:
        slab: its entries say where each weight lies, and where and as what it shall lie in the slab.
        reader: reads the files, now and when the slab is made.
        recipe: what is done to the weights on the way, with the version of whatever does it ("int8:torchao-0.18"); by default what the
            slab's own weights say.

    Raises:
        ReadFault: a file is gone or shorter than it was.
    """
    recipe = recipe or recipe_of(slab) or CAST
    pieces: list[Piece] = []
    described: list[object] = []
    files: dict[Path, int] = {}
    for entry in slab.entries:
        origins = sources_of(entry)
        if not origins:
            return None
        pieces += [Piece(origin.path, origin.offset_bytes, 0, origin.nbytes) for origin in origins]
        stored = [[files.setdefault(o.path, len(files)), o.offset_bytes, o.nbytes, o.dtype, list(o.shape)] for o in origins]
        packed = [entry.offset_bytes, entry.nbytes, str(entry.dtype), list(entry.shape), list(entry.stride)]
        described.append([entry.weight.name, list(entry.path), stored, packed])
    if not pieces:
        return None
    # Another torch may cast by another rule, as it did where 8-bit floats overflow.
    digest = hashlib.sha256(json.dumps([SCHEMA, sys.byteorder, torch.__version__, recipe, slab.nbytes, described]).encode())
    stamps = tuple((path, _stamp(reader, path)) for path in files)
    now_ns = time.time_ns()
    for path, stamp in stamps:
        digest.update(json.dumps(stamp).encode())
        used = _joined(piece for piece in pieces if piece.path == path)
        samples = [(0, min(_SAMPLE_BYTES, stamp[0])), *(end for first, last in used for end in _ends(first, last))]
        for first, last in samples if _is_settled(stamp, now_ns) else used:
            for data in _read(reader, path, first, last):
                digest.update(data)
    return Content(digest.hexdigest(), _title(slab, recipe), stamps)


def _stamp(reader: FileReader, path: Path) -> _Stamp:
    status = reader.status(path)
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _is_settled(stamp: _Stamp, now_ns: int) -> bool:
    return max(stamp[1], stamp[2]) + _SETTLED_NS < now_ns


def _joined(pieces: Iterator[Piece]) -> list[tuple[int, int]]:
    """First and last byte (exclusive) of each range that the pieces cover."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted((p.file_offset, p.file_offset + p.nbytes) for p in pieces):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _ends(first: int, last: int) -> list[tuple[int, int]]:
    if last - first <= 2 * _SAMPLE_BYTES:
        return [(first, last)]
    return [(first, first + _SAMPLE_BYTES), (last - _SAMPLE_BYTES, last)]


def _read(reader: FileReader, path: Path, first: int, last: int) -> Iterator[memoryview]:
    for start in range(first, last, _WINDOW_BYTES):
        buffer = torch.empty(min(_WINDOW_BYTES, last - start), dtype=torch.uint8)
        reader.read([Piece(path, start, 0, buffer.numel())], buffer)
        yield memoryview(buffer.numpy())


def _title(slab: Slab, recipe: str) -> Title:
    origins = sources_of(slab.entries[0])
    source = str(origins[0].path.parent.absolute()) if origins else ""
    sizes: Counter[str] = Counter()
    for entry in slab.entries:
        sizes[str(entry.dtype).removeprefix("torch.")] += entry.nbytes
    form = recipe if recipe != CAST else sizes.most_common(1)[0][0]
    return Title(source, slab.unit.name, form)
