"""The format of a kept slab: what is written is read back, and any other bytes are refused."""

from __future__ import annotations

import contextlib
import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DamagedPack
from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, BadSlabFile, Header, Seal, Title

WORDS = st.text(max_size=300)
HEADERS = st.builds(
    Header,
    key=st.text("0123456789abcdef", min_size=64, max_size=64),
    nbytes=st.integers(1, 2**60),
    crc32=st.integers(0, 2**32 - 1),
    written_s=st.integers(0, 2**40),
    title=st.builds(Title, WORDS, WORDS, WORDS),
)
PLAIN = Header("0" * 64, 8, 1, 2, Title("a", "b", "c"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3)
)


def framed(text: bytes) -> bytes:
    head = b"OFMLSLAB" + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    return (head + text).ljust(SLAB_OFFSET_BYTES, b"\0")


@given(HEADERS)
def test_a_page_says_what_was_written(header: Header) -> None:
    page = header.encode()
    assert len(page) == SLAB_OFFSET_BYTES
    title = Title(
        *(word[-200:].encode("utf-8", "replace").decode() for word in (header.title.source, header.title.block, header.title.form))
    )
    assert Header.decode(page) == replace(header, title=title)


@given(HEADERS, st.integers(0, 8 * SLAB_OFFSET_BYTES - 1))
def test_a_page_with_another_bit_is_refused_or_means_the_same(header: Header, bit: int) -> None:
    page = bytearray(header.encode())
    page[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(BadSlabFile):
        assert Header.decode(bytes(page)).encode() == header.encode()  # it was in the zeros behind the text


@given(st.binary(max_size=64) | st.binary(max_size=2000).map(framed))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadSlabFile):
        Header.decode(data)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["schema", "key", "nbytes", "crc32", "written_s", "source", "block", "form"]), JSON))
def test_fields_of_other_kinds_are_refused_or_valid(changes: dict[str, object]) -> None:
    text = PLAIN.encode()[16:].rstrip(b"\0")
    fields = {**json.loads(text), **changes}
    try:
        found = Header.decode(framed(json.dumps(fields).encode()))
    except BadSlabFile:
        return
    assert type(found.nbytes) is int
    assert found.nbytes > 0
    assert len(found.key) == 64


@pytest.mark.parametrize("text", [b"[" * 4000, b"{}", b"null", b'{"schema": 2}', b"\xff\xfe", b'{"schema": 1, "key": "../../x"}'])
def test_texts_that_mean_nothing_are_refused(text: bytes) -> None:
    with pytest.raises(BadSlabFile):
        Header.decode(framed(text))


@given(st.binary(min_size=1, max_size=40), st.integers(1, 10), st.integers(0, 39))
def test_a_seal_opens_for_the_very_bytes_in_order_and_for_no_others(data: bytes, step: int, at: int) -> None:
    seal = Seal(Path("none"), len(data), zlib.crc32(data))
    other = bytearray(data)
    other[at % len(data)] ^= 1

    def read(found: bytes) -> None:
        for first in range(0, len(found), step):
            seal.check(first, memoryview(found[first : first + step]))

    for _ in range(2):
        with pytest.raises(DamagedPack):
            read(bytes(other))
        assert not seal.is_open
    seal.check(0, memoryview(data[:step]))  # a read that was broken off
    read(data)
    assert seal.is_open
    read(bytes(other))  # once is enough
