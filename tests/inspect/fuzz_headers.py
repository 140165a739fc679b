"""Malformed safetensors files for ``read_header``, which is held against the real library; ``fuzz.py`` runs them.

The rule: either BadCheckpoint, or a header that the library accepts too, with equal entries; what is accepted is made a network as well.
Never another exception, never a second for one input, never more memory than the file is long.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path

import safetensors
from safetensors._safetensors_rust import deserialize

from overflowml_core.errors import BadCheckpoint, NotAModel
from overflowml_core.facts import Workload
from overflowml_core.inspect.safetensors import DTYPE_BITS, read_header
from overflowml_core.inspect.single_file import network_of_file

LARGEST_ALLOCATION_BYTES = 16 * 2**20  # the inputs are a few KiB

ABSURD_NUMBERS = [
    *("-1", "-0", "0", "1", "2", "3", "7", "8", "9", "1.5", "1e3", "1e999", "true", "false", "null", "NaN", "-Infinity", '"4"', "[]", "{}"),
    *(str(2**power + delta) for power in (31, 32, 53, 60, 61, 62, 63, 64, 65, 128) for delta in (-1, 0, 1)),
    *("9" * 400, "9" * 5000, "0" * 50, "01", "0x10", "1_000", "\u0661"),
]
NAMES = ["", "w", "é", "a.b[0]", 'q"', "\n", "😀", "model.layers.0.self_attn.", "double_blocks.0.w", "vae.decoder.conv_in."]
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b" ",
        b"\n",
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\u0061",
        b"\xef\xbb\xbf",
    ),
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"__metadata__":null,', b'"x":1,', b"[" * 300, b'{"a":' * 150),
    *(json.dumps(dtype).encode() for dtype in DTYPE_BITS),
]


def valid_file(rng: random.Random) -> tuple[bytes, bytes]:
    """Header and data of a well-formed file with up to six tensors, some empty, in any order."""
    document: dict[str, object] = {}
    end = 0
    for number in range(rng.randrange(7)):
        dtype = rng.choice(list(DTYPE_BITS))
        shape = [rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(rng.randrange(4))]
        if shape or DTYPE_BITS[dtype] < 8:
            shape = [*shape, 4]  # whole bytes in every dtype
        bits = DTYPE_BITS[dtype]
        for dim in shape:
            bits *= dim
        name = rng.choice(
            ("", "w", "é", "a.b[0]", 'q"', "\n", "😀", "model.layers.0.self_attn.", "double_blocks.0.w", "vae.decoder.conv_in.")
        )
        document[name + str(number)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + bits // 8],
        }
        end += bits // 8
    items = list(document.items())
    rng.shuffle(items)
    if rng.random() < 0.3:
        items.insert(rng.randrange(len(items) + 1), ("__metadata__", {"format": "pt", "é": ""}))
    text = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", ": "))))
    return text.encode() + b" " * rng.randrange(9), rng.randbytes(end)


def mutate_text(header: bytes, rng: random.Random) -> bytes:
    """One change: a bit or byte, a token, a number made absurd, a piece doubled, moved or cut."""
    at = rng.randrange(len(header) + 1)
    to = min(len(header), at + rng.choice((1, 1, 2, 8, 40)))
    match rng.randrange(8):
        case 0:
            flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in header[at : at + 1])
            return header[:at] + flipped + header[at + 1 :]
        case 1:
            return header[:at] + rng.choice(TOKENS) + header[at:]
        case 2:
            return header[:at] + header[to:]
        case 3:
            return header[:at] + header[at:to] * 2 + header[to:]
        case 4:
            return header[:at] + rng.choice(TOKENS) + header[to:]
        case 5:
            return header[:at] + rng.randbytes(rng.randrange(1, 5)) + header[at:]
        case _:
            return _mutate_number(header, rng)


def _mutate_number(header: bytes, rng: random.Random) -> bytes:
    starts = [i for i, byte in enumerate(header) if chr(byte).isdigit() and chr(byte).isascii() and not header[i - 1 : i].isdigit()]
    if not starts:
        return header
    start = stop = rng.choice(starts)
    while stop < len(header) and header[stop : stop + 1].isdigit():
        stop += 1
    old = int(header[start : min(stop, start + 30)])  # an earlier change may have put thousands of digits there
    new = rng.choice((*ABSURD_NUMBERS, str(old + 1), str(max(0, old - 1)), str(old * 2))).encode()
    return header[:start] + new + header[stop:]


def make_input(rng: random.Random) -> bytes:
    """A file: arbitrary bytes, or a well-formed one with none to four changes in its header, length or data."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    header, data = valid_file(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        header = mutate_text(header, rng)
    length = len(header)
    if rng.random() < 0.05:
        length = rng.choice((0, length - 1, length + 1, rng.getrandbits(64), 100_000_000, 100_000_001, 2**64 - 1)) % 2**64
    if rng.random() < 0.1:
        data = rng.choice((data[:-1], data + b"\0", b"", data * 2))
    raw = struct.pack("<Q", length) + header + data
    return raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.03 else raw


def check(path: Path, raw: bytes) -> str:
    """Write one input and read it.

    Returns:
        "accepted", "stricter" (the library would accept it) or "refused".

    Raises:
        AssertionError: the rule is broken.
    """
    path.write_bytes(raw)
    refusal: BadCheckpoint | None = None
    try:
        theirs: dict[str, dict[str, object]] | None = dict(deserialize(raw))
    except safetensors.SafetensorError:
        theirs = None
    try:
        header = read_header(path)
    except BadCheckpoint as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal).removeprefix(str(path)), f"more than one line: {refusal!r}"
        assert len(refusal.problem) < 600, f"endless message: {refusal!r}"
        return "refused" if theirs is None else "stricter"
    assert theirs is not None, f"accepted what the library refuses: {raw!r}"
    assert {entry.name for entry in header.tensors} == set(theirs), f"other names: {raw!r}"
    assert header.size_bytes == len(raw)
    for entry in header.tensors:
        other = theirs[entry.name]
        assert (list(entry.shape), entry.dtype) == (other["shape"], other["dtype"]), f"other entry {entry}: {raw!r}"
        assert raw[entry.offset_bytes : entry.offset_bytes + entry.nbytes] == bytes(other["data"]), f"other bytes {entry}: {raw!r}"  # type: ignore[arg-type]
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == dict(header.metadata), f"other metadata: {raw!r}"
        assert set(opened.keys()) == set(theirs)
    with contextlib.suppress(NotAModel, BadCheckpoint):
        assert network_of_file(path, Workload(prompt_tokens=7)).weight_bytes == sum(entry.nbytes for entry in header.tensors)
    return "accepted"
