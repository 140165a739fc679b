"""The format of a kept slab: a page that says what the file holds, and the slab behind it. Imports no torch; knows no folder.

::

    0     8 bytes    OFMLSLAB
    8     4 bytes    length of the JSON text, little endian
    12    4 bytes    CRC-32 of the JSON text, little endian
    16               JSON text, UTF-8, then zeros
    4096             the slab, to the end of the file
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from overflowml_core.errors import DamagedPack, OverflowmlError

SCHEMA = 1
"""Of this format, and of what a key stands for; files of another schema are made again."""

SLAB_OFFSET_BYTES = 4096
"""Where the slab starts: the largest sector that disks have, so that direct reads of the slab need no bounce buffer."""

_MAGIC = b"OFMLSLAB"
_FRAME = struct.Struct("<8sII")
_KEY = re.compile(r"[0-9a-f]{64}")
_LARGEST_SLAB_BYTES = 2**60
_LONGEST_WORD_CHARS = 200
_CHUNK_BYTES = 8 * 2**20


class BadSlabFile(OverflowmlError):
    """A file that is no kept slab, or not the one that was looked for. It is removed and made again."""


@dataclass(frozen=True, slots=True)
class Title:
    """What people are told of a kept slab; nothing is decided by it.

    Attributes:
        source: the folder that its weights come from.
        block: name of the block in its component.
        form: the dtype or format that the weights are in.
    """

    source: str
    block: str
    form: str


@dataclass(frozen=True, slots=True)
class Header:
    """The first page of a kept slab.

    Attributes:
        key: digest of what the slab was made from.
        nbytes: of the slab.
        crc32: of the slab's bytes.
        written_s: time of the last change that the file system shall report, in whole even seconds, as coarse as any of them counts.
        title: for people.
    """

    key: str
    nbytes: int
    crc32: int
    written_s: int
    title: Title

    def encode(self) -> bytes:
        """The page as bytes."""
        words = {"source": _tail(self.title.source), "block": _tail(self.title.block), "form": _tail(self.title.form)}
        fields = {"schema": SCHEMA, "key": self.key, "nbytes": self.nbytes, "crc32": self.crc32, "written_s": self.written_s, **words}
        text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
        return (_FRAME.pack(_MAGIC, len(text), zlib.crc32(text)) + text).ljust(SLAB_OFFSET_BYTES, b"\0")

    @classmethod
    def decode(cls, page: bytes) -> Header:
        """Read a page, whoever wrote it.

        Raises:
            BadSlabFile: it is none, or of another schema.
        """
        if len(page) != SLAB_OFFSET_BYTES:
            raise BadSlabFile(f"it has {len(page)} bytes, less than a page")
        magic, length, checksum = _FRAME.unpack_from(page)
        text = page[_FRAME.size : _FRAME.size + length]
        if magic != _MAGIC or len(text) != length or zlib.crc32(text) != checksum:
            raise BadSlabFile("its first page is not what was written")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSlabFile(f"its first page cannot be read ({error})") from error
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise BadSlabFile("it is of another version")
        key = _word(fields, "key")
        if not _KEY.fullmatch(key):
            raise BadSlabFile("its key is none")
        title = Title(_word(fields, "source"), _word(fields, "block"), _word(fields, "form"))
        number = _number(fields, "nbytes", 1, _LARGEST_SLAB_BYTES)
        return cls(key, number, _number(fields, "crc32", 0, 2**32 - 1), _number(fields, "written_s", 0, 2**40), title)


def _tail(word: str) -> str:
    return word[-_LONGEST_WORD_CHARS:]


def _word(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > _LONGEST_WORD_CHARS:
        raise BadSlabFile(f"its first page has no {name}")
    return value


def _number(fields: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadSlabFile(f"its first page has no {name}")
    return value


def read_header(descriptor: int) -> Header:
    """Read and check the first page of an open file, and that the file is as long as the page says.

    Raises:
        BadSlabFile: it is no whole kept slab.
        OSError: it cannot be read.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    header = Header.decode(os.read(descriptor, SLAB_OFFSET_BYTES))
    found = os.fstat(descriptor).st_size - SLAB_OFFSET_BYTES
    if found != header.nbytes:
        raise BadSlabFile(f"its slab has {found} bytes in place of {header.nbytes}")
    return header


def check_slab(descriptor: int, header: Header) -> None:
    """Read the whole slab of an open file and hold it against its checksum.

    Raises:
        BadSlabFile: it differs.
        OSError: it cannot be read.
    """
    os.lseek(descriptor, SLAB_OFFSET_BYTES, os.SEEK_SET)
    found = 0
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        found = zlib.crc32(chunk, found)
    if found != header.crc32:
        raise BadSlabFile("its bytes are not those that were written")


def write_slab(descriptor: int, header: Header, slab: memoryview) -> None:
    """Write an empty file and have it on the disk itself when this returns.

    Raises:
        OSError: there is no room, or the disk fails.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    for part in (memoryview(header.encode()), slab):
        write_whole_buffer(descriptor, part)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        # It is read directly or not for a while: the page cache has better uses.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_whole_buffer(descriptor: int, data: memoryview) -> None:
    """Write all bytes at the file's position.

    Raises:
        OSError: there is no room, or the disk fails.
    """
    while data:
        # Systems write two gigabytes at most in one call.
        data = data[os.write(descriptor, data[: 2**30]) :]


class Seal:
    """Holds a kept slab against its checksum when it is first read in this process: no byte is read twice for that, and none that
    came wrong from the disk is computed with."""

    def __init__(self, path: Path, nbytes: int, crc32: int) -> None:
        self._path, self._nbytes, self._crc32 = path, nbytes, crc32
        self._lock = threading.Lock()
        self._found = 0
        self._done_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether the slab was held against its checksum and is right."""
        return self._done_bytes == self._nbytes

    def check(self, first_byte: int, data: memoryview) -> None:
        """Take note of bytes that were read. Those of a slab come in order; from byte 0 on they count anew.

        Args:
            first_byte: offset in the slab.
            data: what was read there.

        Raises:
            DamagedPack: these were the last bytes, and they are not those that were written. The file is removed.
        """
        with self._lock:
            if self.is_open:
                return
            if first_byte == 0:
                self._found = self._done_bytes = 0
            if first_byte != self._done_bytes:
                return  # a part that was read for itself
            self._found = zlib.crc32(data, self._found)
            self._done_bytes += len(data)
            if self.is_open and self._found != self._crc32:
                self._done_bytes = 0
                raise DamagedPack(self._path, SLAB_OFFSET_BYTES, self._nbytes, _is_removed(self._path))


def _is_removed(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that is read-only, or a system that keeps open files
        return False
    return True
