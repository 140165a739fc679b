"""Reads numbers, texts and values of a GGUF header one after the other, never past the file's end and never more than is kept.

Names of a header take a few hundred kilobytes in the largest models, so that a header whose names or kept values go beyond
``_MOST_KEPT_BYTES`` is refused, as is one whose texts would take seconds to step over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

Value: TypeAlias = int | float | bool | str | tuple[int | float | bool, ...]

_NUMBERS: dict[int, tuple[str, int]] = {
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    7: ("B", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
"""Letter of ``struct`` and size in bytes of each numeric type of values (``GGUFValueType`` of the gguf package 0.19)."""

_BOOL, _TEXT, _ARRAY = 7, 8, 9
_LENGTH_BYTES = 8

_MOST_KEPT_BYTES = 32 * 2**20
_LONGEST_NAME_BYTES = 1024  # ggml itself takes 64, converters of image models more
_LONGEST_TEXT_BYTES = 16 * 2**10
_LONGEST_ARRAY = 4096  # one value for each layer, and then some
_MOST_TEXTS = 2_000_000
"""Texts stepped over in one header, in less than a second: the largest vocabularies have 260 000 entries and half a million merges."""

_DEEPEST_ARRAY = 4
_CHUNK_BYTES = 2**18
_QUOTED_CHARS = 80
_AGAIN = "download it again"


class GgufProblem(Exception):
    """What is wrong with a header; the reader adds which file."""

    def __init__(self, problem: str, remedy: str = _AGAIN) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(problem)


def quote(name: str) -> str:
    """A name of the file for a message: on one line, bounded."""
    return ascii(name[:_QUOTED_CHARS]) + ("..." if len(name) > _QUOTED_CHARS else "")


@dataclass(frozen=True, slots=True)
class LongValue:
    """A text or an array that was stepped over: "text" or "array", and its length in bytes or elements."""

    kind: str
    length: int


class Cursor:
    """A position in a file, with a window of bytes behind it.

    Attributes:
        size_bytes: of the file.
        position: of the next byte.
        big_endian: how numbers are stored.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self.size_bytes, self.position, self.big_endian = size_bytes, 0, False
        self._stream = stream
        self._window, self._window_start = b"", 0
        self._kept_bytes = self._texts = 0

    def peek(self, nbytes: int) -> bytes:
        """The next bytes, fewer at the end of the file."""
        at = self.position - self._window_start
        if not 0 <= at <= len(self._window) - nbytes:
            self._stream.seek(self.position)
            self._window, self._window_start, at = self._stream.read(max(nbytes, _CHUNK_BYTES)), self.position, 0
        return self._window[at : at + nbytes]

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes, and step behind them.

        Raises:
            GgufProblem: the file ends before.
        """
        self._need(nbytes, what)
        taken = self.peek(nbytes)
        if len(taken) < nbytes:
            raise GgufProblem(f"it ended at byte {self._window_start + len(self._window)} of {self.size_bytes} while it was read")
        self.position += nbytes
        return taken

    def skip(self, nbytes: int, what: str) -> None:
        """Step over bytes without reading them.

        Raises:
            GgufProblem: the file ends before.
        """
        self._need(nbytes, what)
        self.position += nbytes

    def number(self, nbytes: int, what: str) -> int:
        """A whole number from 0."""
        return int.from_bytes(self.take(nbytes, what), "big" if self.big_endian else "little")

    def text(self, what: str) -> str:
        """A name: a length and as many bytes of UTF-8.

        Raises:
            GgufProblem: it is too long or not UTF-8.
        """
        length = self.number(_LENGTH_BYTES, what)
        if length > _LONGEST_NAME_BYTES:
            raise GgufProblem(f"{what} claims {length} bytes at byte {self.position}; at most {_LONGEST_NAME_BYTES} are read")
        self.keep(length, what)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise GgufProblem(f"{what}, at byte {self.position - length}, is not UTF-8") from None

    def keep(self, nbytes: int, what: str) -> None:
        """Account for bytes that stay in memory.

        Raises:
            GgufProblem: they would be too many in all.
        """
        self._kept_bytes += nbytes
        if self._kept_bytes > _MOST_KEPT_BYTES:
            raise GgufProblem(f"its names and values take more than {_MOST_KEPT_BYTES} bytes, at {what}; no model needs so many")

    def count_texts(self, count: int, key: str) -> None:
        """Account for texts that are stepped over.

        Raises:
            GgufProblem: they would be too many in all.
        """
        self._texts += count
        if self._texts > _MOST_TEXTS:
            raise GgufProblem(f"its metadata holds more than {_MOST_TEXTS} texts, at key {quote(key)}; no vocabulary has so many")

    def _need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size_bytes - self.position:
            raise GgufProblem(
                f"cut short: {what} takes {nbytes} bytes from byte {self.position}, the file has {self.size_bytes}; "
                "the download or the copy was not finished, or its header is damaged"
            )


def read_value(cursor: Cursor, kind: int, key: str) -> Value | LongValue:
    """One value of the metadata, or how long it is where it is long.

    Args:
        cursor: at the value.
        kind: its type, as a number of the format.
        key: whose value it is, for messages.

    Raises:
        GgufProblem: the type is unknown, the value goes past the end of the file, or arrays are nested too deeply.
    """
    if kind in _NUMBERS:
        letter, size = _NUMBERS[kind]
        return _numbers(cursor, kind, letter, size, 1, key)[0]
    if kind == _TEXT:
        return _text_value(cursor, key)
    if kind == _ARRAY:
        return _array_value(cursor, key, 1)
    raise GgufProblem(f"metadata key {quote(key)} has the unknown type {kind} before byte {cursor.position}")


def _numbers(cursor: Cursor, kind: int, letter: str, size: int, count: int, key: str) -> tuple[int | float | bool, ...]:
    raw = cursor.take(size * count, f"the value of metadata key {quote(key)}")
    found: tuple[int | float, ...] = struct.unpack(f"{'>' if cursor.big_endian else '<'}{count}{letter}", raw)
    return tuple(map(bool, found)) if kind == _BOOL else found


def _text_value(cursor: Cursor, key: str) -> str | LongValue:
    what = f"the text of metadata key {quote(key)}"
    length = cursor.number(_LENGTH_BYTES, what)
    cursor.count_texts(1, key)
    if length > _LONGEST_TEXT_BYTES:
        cursor.skip(length, what)
        return LongValue("text", length)
    cursor.keep(length, what)
    return cursor.take(length, what).decode("utf-8", "replace")  # ggml does not ask for UTF-8 here


def _array_value(cursor: Cursor, key: str, depth: int) -> tuple[int | float | bool, ...] | LongValue:
    what = f"the array of metadata key {quote(key)}"
    kind, length = cursor.number(4, what), cursor.number(_LENGTH_BYTES, what)
    if kind in _NUMBERS:
        letter, size = _NUMBERS[kind]
        if length > _LONGEST_ARRAY:
            cursor.skip(length * size, what)
            return LongValue("array", length)
        cursor.keep(length * 32, what)  # what a number takes in Python
        return _numbers(cursor, kind, letter, size, length, key)
    if kind not in (_TEXT, _ARRAY):
        raise GgufProblem(f"metadata key {quote(key)} is an array of the unknown type {kind} before byte {cursor.position}")
    least = _LENGTH_BYTES if kind == _TEXT else 4 + _LENGTH_BYTES
    if length > (cursor.size_bytes - cursor.position) // least:
        raise GgufProblem(f"{what} claims {length} elements at byte {cursor.position}; the file has {cursor.size_bytes} bytes")
    if kind == _ARRAY and depth >= _DEEPEST_ARRAY:
        raise GgufProblem(f"{what} is nested more than {_DEEPEST_ARRAY} deep at byte {cursor.position}")
    cursor.count_texts(length, key)
    for _ in range(length):
        if kind == _TEXT:
            cursor.skip(cursor.number(_LENGTH_BYTES, what), what)
        else:
            _array_value(cursor, key, depth + 1)
    return LongValue("array", length)
