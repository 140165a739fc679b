"""Reads the header of a safetensors file: what tensors it holds and where. Knows nothing of models, and reads no weight.

The parser is stricter than the format's own reader and never laxer: what it accepts, safetensors 0.8 accepts with the same
entries. Stricter means: no key twice anywhere, no unknown field in an entry, no number but a plain integer.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from overflowml_core.errors import BadCheckpoint

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Bits of one element. Source: ``Dtype`` and ``Dtype::bitsize`` of safetensors 0.8 (safetensors/src/tensor.rs at
https://github.com/huggingface/safetensors); a test asks the installed library for each of them."""

LARGEST_HEADER_BYTES = 100_000_000
"""The format's own cap, ``MAX_HEADER_SIZE`` of the same file."""

_MOST_JSON_VALUES = 4_000_000
"""About 8 commas and brackets describe a tensor, so this is half a million tensors in one file; the largest models have half of
that in all their files. Without it a hostile header of 100 MB, all of it ``[],[],``, would take 2.6 GB to parse."""

_LENGTH_BYTES = 8
_LARGEST_ELEMENT_COUNT = 2**60  # times 64 bits it still fits what the format's reader computes with
_LONGEST_NUMBER_DIGITS = 20  # 2**64 has 20; a longer one costs quadratic time to convert
_ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_METADATA_KEY = "__metadata__"
_QUOTED_CHARS = 80
_AGAIN = "download or save it again"
_MAGICS = (
    (b"version ", "it is a Git LFS pointer, not the weights", "run 'git lfs pull' in its folder"),
    (b"PK\x03\x04", "it is a zip archive (a PyTorch pickle?), not safetensors", "convert it with safetensors.torch.save_file"),
    (b"GGUF", "it is a GGUF file, not safetensors", "give it the name *.gguf"),
    (b"<!DOCTYP", "it is a web page, not safetensors", _AGAIN),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: as the format spells it, a key of ``DTYPE_BITS``.
        shape: in elements; empty for a scalar.
        offset_bytes: where its bytes start, from the start of the file.
        nbytes: how many bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself, checked against its size.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        tensors: in the order in which their bytes lie.
        metadata: the writer's notes, empty where it left none.
    """

    path: Path
    size_bytes: int
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


class _Problem(Exception):
    """What is wrong with a header; ``read_header`` adds which file."""

    def __init__(self, problem: str, remedy: str = _AGAIN) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(problem)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file, without reading a weight.

    Args:
        path: the file; a symbolic link is followed.

    Raises:
        BadCheckpoint: the file is missing, unreadable, cut short, or its header is malformed.
    """
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a named pipe would wait for ever
            raise _Problem("it is not a file", "give the path of a *.safetensors file")
        with file.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            raw = _read_raw(stream, size_bytes)
        tensors, metadata = _parse(raw, size_bytes)
    except _Problem as found:
        raise BadCheckpoint(file, found.problem, found.remedy) from None
    except FileNotFoundError:
        raise BadCheckpoint(file, "no such file", "download it again or correct the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise BadCheckpoint(file, f"it cannot be read ({error})", "correct the path or its permissions") from None
    return Header(path=file, size_bytes=size_bytes, tensors=tensors, metadata=MappingProxyType(metadata))


def parse_header(raw: bytes, size_bytes: int, where: str, remedy: str) -> Header:
    """Check the JSON of a header that was read elsewhere.

    Args:
        raw: the JSON alone, without the length before it.
        size_bytes: of the whole file.
        where: what the file is called, for the header and in errors.
        remedy: what to do about a malformed one, for errors.

    Raises:
        BadCheckpoint: it is malformed, or does not fit a file of this size.
    """
    try:
        tensors, metadata = _parse(raw, size_bytes)
    except _Problem as found:
        raise BadCheckpoint(where, found.problem, remedy) from None
    return Header(path=Path(where), size_bytes=size_bytes, tensors=tensors, metadata=MappingProxyType(metadata))


def _read_raw(stream: BinaryIO, size_bytes: int) -> bytes:
    """The header's JSON as bytes. Its length is held against the file's before anything is allocated for it."""
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        raise _Problem(f"{size_bytes} bytes long; the header's length alone takes {_LENGTH_BYTES}")
    length = int.from_bytes(head, "little")
    if length > LARGEST_HEADER_BYTES:
        raise _foreign(head, f"its header claims {length} bytes; the format allows {LARGEST_HEADER_BYTES}")
    if _LENGTH_BYTES + length > size_bytes:
        raise _foreign(head, f"cut short: expected at least {_LENGTH_BYTES + length} bytes for its header, found {size_bytes}")
    first = stream.read(1) if length else b""
    if first != b"{":  # the format demands it, and megabytes of zeros need not be read
        raise _foreign(head, f"its header starts with {first!r}, not with '{{'")
    raw = first + stream.read(length - 1)
    if len(raw) < length:
        raise _Problem(f"its header ended after {len(raw)} of {length} bytes while it was read")
    return raw


def _foreign(head: bytes, problem: str) -> _Problem:
    """What is wrong with a file that hardly is safetensors at all: what it looks like instead, where its first bytes tell."""
    for magic, found, remedy in _MAGICS:
        if head.startswith(magic):
            return _Problem(found, remedy)
    return _Problem(problem, f"it is not safetensors, or damaged: {_AGAIN}")


def _parse(raw: bytes, size_bytes: int) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    document = _load_json(raw)
    metadata = _read_metadata(document.pop(_METADATA_KEY, None))
    data_start = _LENGTH_BYTES + len(raw)
    tensors = [_read_entry(name, value, data_start) for name, value in document.items()]
    tensors.sort(key=lambda entry: (entry.offset_bytes, entry.nbytes))
    _check_cover(tensors, data_start, size_bytes)
    return tuple(tensors), metadata


def _load_json(raw: bytes) -> dict[str, object]:
    values = sum(raw.count(sign) for sign in (b",", b"[", b"{"))
    if values > _MOST_JSON_VALUES:
        raise _Problem(
            f"its header of {len(raw)} bytes lists {values} values, at most {_MOST_JSON_VALUES} are read", "save it in several files"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Problem(f"its header is not UTF-8 (byte {error.start})") from None
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_no_number, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = (
            error.msg
            if isinstance(error, json.JSONDecodeError)
            else "nested too deeply"
            if isinstance(error, RecursionError)
            else str(error)
        )
        raise _Problem(f"its header is not JSON ({reason})") from None
    if not isinstance(document, dict):
        raise _Problem(f"its header is a JSON {type(document).__name__}, not an object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Problem(f"its header names {_quote(twice)} twice")
    return document


def _whole(digits: str) -> int:
    # "-0" is refused too: the format's reader takes it for a float
    if digits.startswith("-") or len(digits) > _LONGEST_NUMBER_DIGITS:
        _no_number(digits)
    return int(digits)


def _no_number(digits: str) -> int:
    raise _Problem(f"its header holds the number {digits[:24]}; sizes and offsets are whole numbers from 0 below 2**64")


def _read_metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Problem(f"its {_METADATA_KEY} is not a table of text")
    for key, text in value.items():
        _check_text(key)
        _check_text(text)
    return value


def _read_entry(name: str, value: object, data_start: int) -> TensorEntry:
    _check_text(name)
    if not isinstance(value, dict):
        raise _Problem(f"tensor {_quote(name)} is described by a {type(value).__name__}, not by an object")
    if value.keys() != _ENTRY_FIELDS:
        odd = min(value.keys() ^ _ENTRY_FIELDS)
        raise _Problem(f"tensor {_quote(name)}: field {_quote(odd)} is {'missing' if odd in _ENTRY_FIELDS else 'unknown'}")
    dtype, shape = value["dtype"], _read_shape(name, value["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Problem(f"tensor {_quote(name)}: dtype {_quote(dtype)} is unknown", "save it in one of the dtypes of safetensors 0.8")
    begin, end = _read_offsets(name, value["data_offsets"])
    bits = _product(name, shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise _Problem(f"tensor {_quote(name)}: {_quote(shape)} of {dtype} takes {bits / 8:.12g} bytes, its offsets hold {end - begin}")
    return TensorEntry(name, dtype, shape, data_start + begin, end - begin)


def _read_shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_count(dim) for dim in value):
        raise _Problem(f"tensor {_quote(name)}: shape {_quote(value)} is not a list of whole numbers from 0")
    return tuple(value)


def _read_offsets(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_count(offset) for offset in value):
        raise _Problem(f"tensor {_quote(name)}: data_offsets {_quote(value)} are not two whole numbers from 0")
    begin, end = value
    if begin > end:
        raise _Problem(f"tensor {_quote(name)}: begins at {begin}, after its end at {end}")
    return begin, end


def _product(name: str, shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
        if count > _LARGEST_ELEMENT_COUNT or dim > _LARGEST_ELEMENT_COUNT:
            raise _Problem(f"tensor {_quote(name)}: shape {_quote(shape)} has more than 2**60 elements")
    return count


def _check_cover(tensors: list[TensorEntry], data_start: int, size_bytes: int) -> None:
    """Tensors in file order must follow one another without hole or overlap, and end where the file ends."""
    end = data_start
    before = "the header"
    for entry in tensors:
        if entry.offset_bytes < end:
            raise _Problem(f"tensor {_quote(entry.name)} begins {end - entry.offset_bytes} bytes before the end of {before}: they overlap")
        if entry.offset_bytes > end:
            raise _Problem(f"{entry.offset_bytes - end} bytes between {before} and tensor {_quote(entry.name)} belong to no tensor")
        end = entry.offset_bytes + entry.nbytes
        before = f"tensor {_quote(entry.name)}"
    if end > size_bytes:
        raise _Problem(f"cut short: expected {end} bytes, found {size_bytes}; the download or the copy was not finished")
    if end < size_bytes:
        raise _Problem(f"{size_bytes - end} bytes too long: expected {end} bytes, found {size_bytes}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # not negative: _whole refused those


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Problem(f"its header holds {_quote(text)}, which is not Unicode text") from None


def _quote(value: object) -> str:
    """A value of the file for a message: on one line, bounded."""
    if isinstance(value, (str, list, tuple)):
        value = value[:_QUOTED_CHARS]
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "..."
