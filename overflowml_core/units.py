"""Sizes and durations as people write them; the only file where a unit prefix appears."""

from __future__ import annotations

import re

from overflowml_core.errors import BadSize

_FACTORS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+)\s*", re.ASCII)
_PLAIN = re.compile(r"\s*[0-9]{1,20}(\.[0-9]+)?\s*", re.ASCII)
_LARGEST_BYTES = 2**60
_SMALLEST_PLAIN_BYTES = 2**20


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Read a size such as ``"8GB"``, ``"512MiB"`` or a plain number of bytes.

    GB is 10**9 bytes and GiB 2**30, as the SI and IEC standards (and accelerate) have it. A plain integer is bytes, and at
    least 1 MiB, because ``overflow=8`` means eight gigabytes to its writer and eight bytes to a parser.

    Args:
        size: the size to read, bytes where it is an integer.
        what: what the size is, for the message ("overflow", "host_memory").

    Raises:
        BadSize: the value is no size, is not positive or is larger than 2**60 bytes.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise BadSize(what, size)
    if isinstance(size, int):
        nbytes = size
        if 0 < nbytes < _SMALLEST_PLAIN_BYTES:
            raise BadSize(what, size, why="a plain number is read as bytes")
    else:
        match = _SIZE.fullmatch(size)
        if _PLAIN.fullmatch(size) is not None:
            raise BadSize(what, size, why="it has no unit")
        if match is None or match[2].lower() not in _FACTORS or len(match[1]) > 20:
            raise BadSize(what, size)
        nbytes = int(float(match[1]) * _FACTORS[match[2].lower()])
    if not 0 < nbytes <= _LARGEST_BYTES:
        raise BadSize(what, size)
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Write bytes for people, in powers of 1024 with their IEC names: ``"5.33 GiB"``."""
    size = float(abs(nbytes))
    sign = "-" if nbytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.{2 if unit == 'GiB' else 1}f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} TiB"


def ceil_size(nbytes: int) -> str:
    """The smallest size in whole MB that holds ``nbytes``, in the form that :func:`parse_bytes` reads back."""
    return f"{-(-nbytes // 10**6)}MB"


def format_seconds(seconds: float) -> str:
    """Write seconds for people: ``"850 ms"``, ``"4.2 s"``, ``"3 min 05 s"``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
