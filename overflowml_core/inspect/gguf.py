"""Reads the header of a GGUF file, or of all parts of a split one: metadata, and which tensor lies where. Reads no weight, knows no model.

Nothing is allocated for a number in the file before it was held against the file's size and a limit. Long arrays and texts (a vocabulary, a
chat template) are stepped over; only their length is kept.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from overflowml_core.errors import BadCheckpoint
from overflowml_core.inspect.ggml_types import GGML_TYPES
from overflowml_core.inspect.gguf_cursor import Cursor, GgufProblem, LongValue, Value, quote, read_value

Metadata: TypeAlias = Mapping[str, Value | LongValue]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_TENSORS = 2**16
"""The largest models have one or two thousand, since experts are stacked; thirty times that is either damage or malice."""

_MOST_KEYS = 2**16
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS of ggml.h
_LARGEST_ELEMENT_COUNT = 2**59  # times 8 bytes it still fits a signed offset
_LARGEST_ALIGNMENT = 2**20
_DEFAULT_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT of gguf.h
_UINT32 = 4  # GGUF_TYPE_UINT32
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 13, 24  # an empty name, a type and one byte; an empty name, no dimension, type and offset
_MOST_PARTS = 99_999  # five digits in the name
_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.ASCII | re.DOTALL)
_AGAIN = "download it again"
_FOREIGN = (
    (b"FUGG", "its magic is GGUF backwards", "convert it again: magic and version of a big-endian file are written apart"),
    (b"ggjt", "it is a GGML file of before GGUF", "convert the original model to GGUF"),
    (b"version ", "it is a Git LFS pointer, not the weights", "run 'git lfs pull' in its folder"),
    (b"PK\x03\x04", "it is a zip archive (a PyTorch pickle?), not GGUF", "convert it"),
    (b"<!DOCTYP", "it is a web page, not GGUF", _AGAIN),
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name.
        type_name: as ggml calls it ("Q4_K").
        shape: in elements, the slowest dimension first, as torch has it (the file has it the other way round).
        offset_bytes: where its bytes start, from the start of the file.
        nbytes: how many bytes it takes.
        by_offset: its type is unknown, and its bytes are those up to the next tensor or the end of the file: exact where it has more rows
            than the alignment has bytes, else too many by less than the alignment.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int
    by_offset: bool = False


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says about itself, checked against its size.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        version: of the format, 2 or 3.
        big_endian: numbers are stored with their highest byte first.
        metadata: by key; long arrays and texts as their length.
        tensors: in the order in which their bytes lie.
    """

    path: Path
    size_bytes: int
    version: int
    big_endian: bool
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in one file or in several parts.

    Attributes:
        files: in order.
        metadata: of the first file.
        tensors: of all files, in the files' order.
    """

    files: tuple[Path, ...]
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]


def open_gguf(path: str | os.PathLike[str], unknown_types: bool = False) -> GgufModel:
    """Read a model's header; of a split model any part may be given, and the headers of all are read and held against each other.

    Args:
        path: the file.
        unknown_types: as for :func:`read_gguf_header`.

    Raises:
        BadCheckpoint: a file is missing, cut short or malformed, or a part belongs to another set.
    """
    file = Path(path)
    match = _PART.fullmatch(file.name)
    if match is None:
        header = read_gguf_header(file, unknown_types)
        if _whole(header.metadata.get("split.count")) > 1:
            count = _whole(header.metadata["split.count"])
            raise BadCheckpoint(
                file, f"it is a part of {count}, and its name does not end in -00001-of-{count:05d}.gguf", "rename the parts"
            )
        return GgufModel((file,), header.metadata, header.tensors)
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise BadCheckpoint(file, f"its name says part {int(match[2])} of {count}", "rename it")
    headers = []
    for number in range(1, count + 1):
        part = file.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not os.path.isfile(part):
            raise BadCheckpoint(part, f"missing; {file.name} is part {int(match[2])} of {count}", "download all parts into one folder")
        headers.append(read_gguf_header(part, unknown_types))
    return _join(headers)


def _join(headers: list[GgufHeader]) -> GgufModel:
    tensors: list[GgufTensor] = []
    owner: dict[str, Path] = {}
    for number, header in enumerate(headers):
        said, count = _whole(header.metadata.get("split.no"), number), _whole(header.metadata.get("split.count"), len(headers))
        if said != number or count != len(headers):
            raise BadCheckpoint(
                header.path,
                f"its name says part {number + 1} of {len(headers)}, its header part {said + 1} of {count}",
                "download all parts of one model, and leave their names",
            )
        for tensor in header.tensors:
            if tensor.name in owner:
                raise BadCheckpoint(
                    header.path, f"tensor {quote(tensor.name)} is in {owner[tensor.name].name} too", "download all parts again"
                )
            owner[tensor.name] = header.path
        tensors.extend(header.tensors)
    wanted = _whole(headers[0].metadata.get("split.tensors.count"), len(tensors))
    if wanted != len(tensors):
        raise BadCheckpoint(
            headers[0].path, f"says that its parts hold {wanted} tensors, they hold {len(tensors)}", "download all parts again"
        )
    return GgufModel(tuple(header.path for header in headers), headers[0].metadata, tuple(tensors))


def _whole(value: Value | LongValue | None, default: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def read_gguf_header(path: str | os.PathLike[str], unknown_types: bool = False) -> GgufHeader:
    """Read and check the header of one GGUF file of version 2 or 3, of either byte order.

    Args:
        path: the file; a symbolic link is followed.
        unknown_types: accept tensors of types that are not known, and take their bytes from where the next tensor starts; for whoever
            counts bytes and decodes none.

    Raises:
        BadCheckpoint: the file is missing, unreadable, cut short, or its header is malformed; the message names what and where.
    """
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a named pipe would wait for ever
            raise GgufProblem("it is not a file", "give the path of a *.gguf file")
        with file.open("rb") as stream:
            return _read(file, Cursor(stream, os.fstat(stream.fileno()).st_size), unknown_types)
    except GgufProblem as found:
        raise BadCheckpoint(file, found.problem, found.remedy) from None
    except FileNotFoundError:
        raise BadCheckpoint(file, "no such file", f"{_AGAIN} or correct the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise BadCheckpoint(file, f"it cannot be read ({error})", "correct the path or its permissions") from None


def _read(file: Path, cursor: Cursor, unknown_types: bool) -> GgufHeader:
    version = _read_version(cursor)
    tensor_count, key_count = cursor.number(8, "the number of tensors"), cursor.number(8, "the number of metadata keys")
    _check_count("tensors", tensor_count, _MOST_TENSORS, _LEAST_TENSOR_BYTES, cursor)
    _check_count("metadata keys", key_count, _MOST_KEYS, _LEAST_KEY_BYTES, cursor)
    metadata: dict[str, Value | LongValue] = {}
    for number in range(key_count):
        key = cursor.text(f"the name of metadata key {number + 1} of {key_count}")
        if key in metadata:
            raise GgufProblem(f"metadata key {quote(key)} stands twice, the second time at byte {cursor.position}")
        kind = cursor.number(4, f"the type of metadata key {quote(key)}")
        if key == "general.alignment" and kind != _UINT32:
            raise GgufProblem(f"general.alignment is of type {kind}, the format demands {_UINT32}")
        metadata[key] = read_value(cursor, kind, key)
    alignment = _alignment(metadata)
    infos = _read_infos(cursor, tensor_count, unknown_types)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _locate(infos, data_start, alignment, cursor.size_bytes)
    return GgufHeader(file, cursor.size_bytes, version, cursor.big_endian, MappingProxyType(metadata), tensors)


def _read_version(cursor: Cursor) -> int:
    head = cursor.peek(8)
    if head[:4] != _MAGIC:
        for magic, problem, remedy in _FOREIGN:
            if head.startswith(magic):
                raise GgufProblem(problem, remedy)
        raise GgufProblem(f"it starts with {head[:4]!r}, not with {_MAGIC!r}", f"it is not GGUF, or damaged: {_AGAIN}")
    cursor.take(4, "its magic")
    version = cursor.number(4, "the version")
    if version & 0xFFFF == 0 and version:  # small numbers have their zeros on the other side
        cursor.big_endian = True
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS:
        raise GgufProblem(f"it is GGUF of version {version}; versions 2 and 3 are read", "convert the original model again")
    return version


def _check_count(what: str, count: int, most: int, least_bytes: int, cursor: Cursor) -> None:
    room = (cursor.size_bytes - cursor.position) // least_bytes
    if count > min(most, room):
        why = f"at most {most} are read" if count > most else f"no more than {room} fit into the rest of its {cursor.size_bytes} bytes"
        raise GgufProblem(f"its header claims {count} {what}; {why}")


def _alignment(metadata: Mapping[str, Value | LongValue]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise GgufProblem(f"general.alignment is {str(value)[:40]!r}, not a power of two up to {_LARGEST_ALIGNMENT}")
    return value


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    by_offset: bool = False


def _read_infos(cursor: Cursor, count: int, unknown_types: bool) -> list[_Info]:
    infos: list[_Info] = []
    seen: set[str] = set()
    for number in range(count):
        name = cursor.text(f"the name of tensor {number + 1} of {count}")
        if name in seen:
            raise GgufProblem(f"tensor {quote(name)} stands twice in its header")
        seen.add(name)
        dimensions = cursor.number(4, f"the number of dimensions of tensor {quote(name)}")
        if dimensions > _MOST_DIMENSIONS:
            raise GgufProblem(f"tensor {quote(name)} has {dimensions} dimensions; ggml has at most {_MOST_DIMENSIONS}")
        shape = tuple(cursor.number(8, f"the shape of tensor {quote(name)}") for _ in range(dimensions))
        kind, offset = cursor.number(4, f"the type of tensor {quote(name)}"), cursor.number(8, f"the offset of tensor {quote(name)}")
        infos.append(_info(name, shape, kind, offset, unknown_types))
    return infos


def _info(name: str, shape: tuple[int, ...], kind: int, offset: int, unknown_types: bool) -> _Info:
    found = GGML_TYPES.get(kind)
    if found is None and not unknown_types:
        raise GgufProblem(
            f"tensor {quote(name)} is of ggml type {kind}, which is unknown", "update overflowml, or convert it to another type"
        )
    elements, bound = 1, 1
    for size in shape:
        elements, bound = elements * size, bound * max(size, 1)  # an empty dimension excuses no absurd one
        if bound > _LARGEST_ELEMENT_COUNT:
            raise GgufProblem(f"tensor {quote(name)}: shape {list(reversed(shape))} has more than 2**59 elements")
    if found is None:
        return _Info(name, f"type {kind}", tuple(reversed(shape)), offset, 0, by_offset=True)
    row = shape[0] if shape else 1
    if row % found.block_count:
        raise GgufProblem(
            f"tensor {quote(name)}: rows of {row} elements do not divide into blocks of {found.block_count} of type {found.name}"
        )
    return _Info(name, found.name, tuple(reversed(shape)), offset, elements // found.block_count * found.block_bytes)


def _locate(infos: list[_Info], data_start: int, alignment: int, size_bytes: int) -> tuple[GgufTensor, ...]:
    """Tensors must start at multiples of the alignment, must not overlap and must end inside the file."""
    tensors: list[GgufTensor] = []
    end, before = 0, ""
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    ends = [*(info.offset for info in infos[1:]), size_bytes - data_start]
    for info, next_offset in zip(infos, ends, strict=False):
        if info.offset % alignment:
            raise GgufProblem(f"tensor {quote(info.name)} starts {info.offset} bytes into the data, not at a multiple of {alignment}")
        if info.offset < end:
            raise GgufProblem(
                f"tensor {quote(info.name)} starts {end - info.offset} bytes before the end of tensor {quote(before)}: they overlap"
            )
        nbytes = next_offset - info.offset if info.by_offset else info.nbytes
        if info.by_offset and nbytes > 0:
            nbytes -= nbytes % max(math.prod(info.shape[:-1]), 1)  # rows are of equal bytes; what is left over is padding
        if nbytes < 0:
            raise GgufProblem(f"cut short: tensor {quote(info.name)} starts behind the end of the file's {size_bytes} bytes")
        end, before = info.offset + nbytes, info.name
        tensors.append(GgufTensor(info.name, info.type_name, info.shape, data_start + info.offset, nbytes, info.by_offset))
    if tensors and data_start + end > size_bytes:
        raise GgufProblem(
            f"cut short: tensor {quote(before)} ends at byte {data_start + end}, the file has {size_bytes}; "
            "the download or the copy was not finished"
        )
    return tuple(tensors)
