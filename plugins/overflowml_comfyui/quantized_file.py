"""A safetensors file with quantized weights: how it is laid out, written so that it is there whole or not at all, and recognized again.

Beside each quantized weight lie its scales and a tensor ``comfy_quant`` that names its format, so that any loader of the host finds it. The
header says what the file was made from, and holds a checksum of every byte behind it. Imports torch only where a file is written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overflowml_comfyui.formats import HostFormat
from overflowml_comfyui.source import Source, Stamp
from overflowml_core.errors import BadCheckpoint, FileChanged, OverflowmlError
from overflowml_core.inspect.safetensors import DTYPE_BITS, Header, TensorEntry, read_header
from overflowml_core.runtime.file_lock import Lock, share, take
from overflowml_core.runtime.open_file import OpenFile

if TYPE_CHECKING:
    from overflowml_comfyui.encoding import Encoder

SCHEMA = 1
"""Of the record, and of what a file holds for a weight; files of another schema are made again."""

_RECORD, _CHECKSUM = "overflowml", "overflowml_crc32"
_NO_CHECKSUM = "0" * 8
_CHUNK_BYTES = 8 * 2**20
_HEADER_ALIGNMENT_BYTES = 8
_PART = ".part"
_SMALL_BYTES = 64 * 2**10
_TORCH_NAMES = dict(
    zip(
        ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
        ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        strict=True,
    )
)
_STALE_PART_S = 3600.0
"""Where a file system knows no locks, a part whose last change is longer ago is nobody's work any more."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says of its making.

    Attributes:
        conversion: fingerprint of what was asked: the source's name, its tensors, and the format of each layer.
        stamp: of the source.
        plan: fingerprint of the plan that asked for it.
        made_by: what converted the weights, with its version.
        written_s: time of the last change that the file system shall report, in whole even seconds, as coarse as any of them counts.
    """

    conversion: str
    stamp: Stamp
    plan: str
    made_by: str
    written_s: int

    def text(self) -> str:
        """As the header holds it."""
        stamp = [self.stamp.size_bytes, self.stamp.mtime_ns, self.stamp.ctime_ns]
        values = {"schema": SCHEMA, "conversion": self.conversion, "source": stamp, "plan": self.plan}
        return json.dumps({**values, "made_by": self.made_by, "written_s": self.written_s})

    @classmethod
    def of(cls, header: Header) -> Record | None:
        """The record of a file; None where it has none of this version."""
        try:
            values = json.loads(header.metadata.get(_RECORD, ""))
            words = [values[name] for name in ("conversion", "plan", "made_by")]
            numbers = [*values["source"], values["written_s"]]
            known = values["schema"] == SCHEMA and all(isinstance(word, str) for word in words)
            if not known or len(numbers) != 4 or not all(type(number) is int for number in numbers):
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return cls(words[0], Stamp(*numbers[:3]), words[1], words[2], numbers[3])


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the new file: where its bytes come from is either an entry of the source or a part of a layer's quantized weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: TensorEntry | None = None
    layer: str = ""
    suffix: str = ""
    mark: bytes = b""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before it is written.

    Attributes:
        source: what it is made from.
        formats: of the layers that are quantized, by their names inside the model.
        record: what it says of itself.
        tensors: in the order in which their bytes lie, each with the offset behind the header.
        header: length and JSON, with a place for the checksum.
        weight_bytes: of its tensors without the marks: what a device holds.
        file_bytes: of the whole file.
    """

    source: Source
    formats: Mapping[str, HostFormat]
    record: Record
    tensors: tuple[tuple[_Stored, int], ...]
    header: bytes
    weight_bytes: int
    file_bytes: int


def lay_out(source: Source, formats: Mapping[str, HostFormat], record: Record) -> Layout:
    """Work out a file: every size in it is known before a weight is read.

    Args:
        source: the model's file.
        formats: of the layers that are quantized.
        record: what the file shall say of itself.
    """
    # Wide elements first, so that each tensor starts on a multiple of its element whatever the shapes are; else as in the source.
    stored = sorted(_stored(source, formats), key=lambda one: -DTYPE_BITS[one.dtype])
    kept = {name: text for name, text in source.header.metadata.items() if not name.startswith((_RECORD, "_quantization"))}
    document: dict[str, object] = {"__metadata__": {**kept, _RECORD: record.text(), _CHECKSUM: _NO_CHECKSUM}}
    offset, placed = 0, []
    for one in stored:
        placed.append((one, offset))
        document[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [offset, offset + one.nbytes]}
        offset += one.nbytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    header = len(text).to_bytes(8, "little") + text
    weight_bytes = sum(one.nbytes for one in stored if not one.mark)
    return Layout(source, formats, record, tuple(placed), header, weight_bytes, len(header) + offset)


def _stored(source: Source, formats: Mapping[str, HostFormat]) -> Iterator[_Stored]:
    for name, entry in source.tensors.items():
        layer = name.removesuffix(".weight")
        one = formats.get(layer) if layer != name else None
        if one is None:
            yield _Stored(name, entry.dtype, entry.shape, entry)
            continue
        for part in one.parts:
            yield _Stored(name + part.suffix, part.dtype, part.shape(entry.shape[0], entry.shape[1]), None, layer, part.suffix)
        yield _Stored(f"{layer}.comfy_quant", "U8", (len(one.mark),), None, layer, "", one.mark)


def write(layout: Layout, encoders: Mapping[str, Encoder], path: Path, progress: Callable[[int, int], None]) -> None:
    """Make the file under a name of its own, and give it its name when it is whole and on the disk.

    One weight is held at a time. Whatever is raised on the way, nothing is left behind.

    Args:
        layout: of the file.
        encoders: by the name of the format.
        path: where it shall lie; a file that is there is replaced at the very end.
        progress: told the bytes of the source that are done, and all of them; what it raises ends the work.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
        FileChanged: somebody wrote to the source meanwhile.
        OverflowmlError: a weight cannot be converted.
    """
    _remove_stale_parts(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=_PART, dir=path.parent)
    try:
        try:
            share(descriptor)  # says to others that somebody is at work on it
            _fill(layout, encoders, descriptor, progress)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.chmod(name, 0o666 & ~_umask())
        os.utime(name, (layout.record.written_s, layout.record.written_s))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _fill(layout: Layout, encoders: Mapping[str, Encoder], descriptor: int, progress: Callable[[int, int], None]) -> None:
    source, start = layout.source, len(layout.header)
    places = {(one.layer, one.suffix, bool(one.mark)): (one, start + offset) for one, offset in layout.tensors if one.layer}
    plain = {one.name: start + offset for one, offset in layout.tensors if one.origin is not None}
    checksums: dict[str, int] = {}
    total, done = sum(entry.nbytes for entry in source.tensors.values()), 0
    os.truncate(descriptor, layout.file_bytes)
    file = _opened(source)
    try:
        _check(source, file)
        for name, entry in sorted(source.tensors.items(), key=lambda pair: pair[1].offset_bytes):
            progress(done, total)
            if name in plain:
                checksums[name] = _write_at(descriptor, plain[name], _chunks(file, entry))
            else:
                layer = name.removesuffix(".weight")
                one = layout.formats[layer]
                for suffix, part in encoders[one.name].encode(_read(file, entry), name).items():
                    stored, offset = places[layer, suffix, False]
                    checksums[stored.name] = _write_at(descriptor, offset, (_bytes_of(part),))
                stored, offset = places[layer, "", True]
                checksums[stored.name] = _write_at(descriptor, offset, (stored.mark,))
            done += entry.nbytes
        _check(source, file)
    finally:
        file.close()
    progress(done, total)
    whole = _together(checksums[one.name] for one, _ in layout.tensors)
    _write_at(descriptor, 0, (layout.header.replace(_quoted(_NO_CHECKSUM), _quoted(f"{whole:08x}"), 1),))


def _quoted(checksum: str) -> bytes:
    return json.dumps({_CHECKSUM: checksum}, separators=(",", ":"))[1:-1].encode()


def _check(source: Source, file: OpenFile) -> None:
    now = file.status()
    if (now.st_size, now.st_mtime_ns) != (source.stamp.size_bytes, source.stamp.mtime_ns):
        raise FileChanged(source.path, (source.stamp.size_bytes, source.stamp.mtime_ns), (now.st_size, now.st_mtime_ns))


def _read(file: OpenFile, entry: TensorEntry) -> Any:
    """A tensor of the source."""
    import torch

    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    file.read([memoryview(data.numpy())], entry.offset_bytes, direct=False)
    return data.view(_dtype(entry)).reshape(entry.shape)


def _dtype(entry: TensorEntry) -> Any:
    import torch

    return getattr(torch, _TORCH_NAMES[entry.dtype]) if entry.dtype in _TORCH_NAMES else None


def light(source: Source) -> dict[str, Any]:
    """The tensors of a source for whoever tells kinds of models apart: large ones without data, small ones with theirs.

    Raises:
        BadCheckpoint: the file cannot be read.
    """
    import torch

    found = {}
    file = _opened(source)
    try:
        for name, entry in source.tensors.items():
            if entry.dtype not in _TORCH_NAMES or entry.nbytes > _SMALL_BYTES:
                found[name] = torch.empty(entry.shape, dtype=_dtype(entry) or torch.uint8, device="meta")
            else:
                found[name] = _read(file, entry)
    finally:
        file.close()
    return found


def _opened(source: Source) -> OpenFile:
    try:
        return OpenFile(source.path)
    except OSError as error:
        raise BadCheckpoint(source.path, f"it cannot be read ({error})", "correct the path or its permissions") from None


def _chunks(file: OpenFile, entry: TensorEntry) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(entry.nbytes, _CHUNK_BYTES)))
    for begin in range(0, entry.nbytes, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, entry.nbytes - begin)]
        file.read([chunk], entry.offset_bytes + begin, direct=False)
        yield chunk


def _bytes_of(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write_at(descriptor: int, offset: int, chunks: Any) -> int:
    """Write bytes one behind the other, and return their CRC-32."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    found = 0
    for chunk in chunks:
        found = zlib.crc32(chunk, found)
        left = memoryview(chunk)
        while left:
            left = left[os.write(descriptor, left[: 2**30]) :]  # systems write two gigabytes at most in one call
    return found


def _together(checksums: Any) -> int:
    """One checksum over those of the tensors in their order: they are not written in it."""
    found = 0
    for one in checksums:
        found = zlib.crc32(one.to_bytes(4, "little"), found)
    return found


def is_whole(path: Path) -> bool:
    """Whether a file's bytes are those that were written: by its time where nobody touched it since, else by its checksum.

    A right one gets its time again.

    Raises:
        BadCheckpoint: it is missing or damaged.
        OSError: it cannot be read.
    """
    header = read_header(path)
    record = Record.of(header)
    if record is None:
        return False
    if path.stat().st_mtime_ns == record.written_s * 10**9:
        return True
    with path.open("rb") as file:
        found = _together(_checksum(file, entry) for entry in header.tensors)
    if f"{found:08x}" != header.metadata.get(_CHECKSUM):
        return False
    with contextlib.suppress(OSError):  # a folder of somebody else's: it is read again next time
        os.utime(path, (record.written_s, record.written_s))
    return True


def _checksum(file: Any, entry: TensorEntry) -> int:
    file.seek(entry.offset_bytes)
    found, left = 0, entry.nbytes
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            break
        found, left = zlib.crc32(chunk, found), left - len(chunk)
    return found


def answers(path: Path, conversion: str, stamp: Stamp) -> str:
    """Why a file is not what is asked for; empty where it is.

    Args:
        path: the file.
        conversion: fingerprint of what is asked.
        stamp: of the source as it is now.
    """
    try:
        record = Record.of(read_header(path))
        if record is None or record.conversion != conversion:
            return "it was made for something else"
        if record.stamp != stamp:
            return "the file that it was made from is another one now"
        return "" if is_whole(path) else "its bytes are not those that were written"
    except (OverflowmlError, OSError) as error:
        return error.problem if isinstance(error, BadCheckpoint) else str(error)


def now_s() -> int:
    """The time in whole even seconds."""
    return int(time.time()) // 2 * 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_stale_parts(path: Path) -> None:
    """Parts of this file that a writer left which was killed."""
    for part in path.parent.glob(f".{_escaped(path.name[:100])}.*{_PART}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(part, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                lock = take(descriptor)
                old = time.time() - os.fstat(descriptor).st_mtime > _STALE_PART_S
                if lock is Lock.HELD or (lock is Lock.NONE and old):
                    part.unlink()
            finally:
                os.close(descriptor)


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)
