"""Where a block lies in a slot or a ring buffer so that it can be read straight from its file: every byte in place, pages on pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.loading import Origin
from overflowml_core.runtime.chunks import DIRECT_ALIGNMENT_BYTES, LEAST_DIRECT_BYTES, Piece, chunks_of
from overflowml_core.runtime.file_layout import as_in_file
from overflowml_core.runtime.ring_layout import windows_of
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.structure import Unit


@dataclass
class Stored:
    """A weight in a file."""

    file: int
    offset_bytes: int
    nbytes: int
    dtype: torch.dtype


@st.composite
def stored(draw: st.DrawFn) -> list[Stored]:
    """Weights of one block in up to three files, in the order of the module, which is not the files'."""
    ends = [draw(st.integers(0, 5000)) for _ in range(3)]
    weights = []
    for _ in range(draw(st.integers(1, 8))):
        file, dtype = draw(st.integers(0, 2)), draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
        count = draw(st.sampled_from([0, 1, 7, 3000, LEAST_DIRECT_BYTES // 4, LEAST_DIRECT_BYTES + 5]))
        gap = draw(st.sampled_from([0, 0, 0, 4, 31, 5000]))
        start = ends[file] + gap
        start += -start % dtype.itemsize
        weights.append(Stored(file, start, count * dtype.itemsize, dtype))
        ends[file] = start + count * dtype.itemsize
    return draw(st.permutations(weights))


def slab_of(weights: list[Stored]) -> Slab:
    entries, end = [], 0
    for weight in weights:
        origin = Origin(Path(f"f{weight.file}"), weight.offset_bytes, weight.nbytes, "U8", (weight.nbytes,))
        shape = (weight.nbytes // weight.dtype.itemsize,)
        entries.append(Entry(None, end, weight.nbytes, shape, (1,), weight.dtype, origin))  # type: ignore[arg-type]
        end += -(-weight.nbytes // 512) * 512
    return Slab(Unit("block", None, ()), tuple(entries), end)


def origin_of(piece: Piece, place: int) -> tuple[Path, int]:
    return piece.path, piece.file_offset + place - piece.buffer_offset


@given(stored())
def test_weights_in_a_slot_lie_as_in_their_files(weights: list[Stored]) -> None:
    slab = slab_of(weights)
    layout = as_in_file(slab)
    if layout is None:
        assert slab.nbytes < LEAST_DIRECT_BYTES
        return
    for before, entry in zip(slab.entries, layout.slab.entries, strict=True):
        assert (entry.weight, entry.origin, entry.nbytes, entry.shape) == (before.weight, before.origin, before.nbytes, before.shape)
        if not entry.nbytes:
            continue
        assert entry.offset_bytes % entry.dtype.itemsize == 0
        assert 0 <= entry.offset_bytes <= layout.slab.nbytes - entry.nbytes
        holders = [p for p in layout.pieces if p.buffer_offset <= entry.offset_bytes < p.buffer_offset + p.nbytes]
        assert [origin_of(p, entry.offset_bytes) for p in holders] == [(before.origin.path, before.origin.offset_bytes)]
        assert entry.offset_bytes + entry.nbytes <= holders[0].buffer_offset + holders[0].nbytes


@given(stored())
def test_a_slot_takes_less_than_a_page_more_for_each_stretch_of_a_file(weights: list[Stored]) -> None:
    layout = as_in_file(slab_of(weights))
    if layout is not None:
        end = 0
        for piece in layout.pieces:
            assert piece.buffer_offset % DIRECT_ALIGNMENT_BYTES == piece.file_offset % DIRECT_ALIGNMENT_BYTES
            assert 0 <= piece.buffer_offset - end < DIRECT_ALIGNMENT_BYTES
            end = piece.buffer_offset + piece.nbytes
        assert layout.slab.nbytes == end


def test_weights_on_no_multiple_of_their_element_size_are_not_used_in_place() -> None:
    assert as_in_file(slab_of([Stored(0, 1002, LEAST_DIRECT_BYTES, torch.bfloat16)])) is not None
    assert as_in_file(slab_of([Stored(0, 1001, LEAST_DIRECT_BYTES, torch.bfloat16)])) is None


def test_blocks_that_no_file_holds_are_not_laid_out() -> None:
    slab = slab_of([Stored(0, 0, LEAST_DIRECT_BYTES, torch.uint8), Stored(0, LEAST_DIRECT_BYTES, 8, torch.uint8)])
    lost = Slab(slab.unit, (slab.entries[0], Entry(None, 0, 8, (8,), (1,), torch.uint8, None)), slab.nbytes)  # type: ignore[arg-type]
    assert as_in_file(lost) is None


# ---- the ring

WINDOW_BYTES = LEAST_DIRECT_BYTES + 3 * DIRECT_ALIGNMENT_BYTES + 512


@given(stored(), st.sampled_from([1000, WINDOW_BYTES, 4 * WINDOW_BYTES]))
def test_windows_bring_every_byte_to_its_place_in_the_slab_once(weights: list[Stored], window_bytes: int) -> None:
    pieces = [Piece(entry.origin.path, entry.origin.offset_bytes, entry.offset_bytes, entry.nbytes) for entry in slab_of(weights).entries]
    expected = sorted((str(p.path), p.file_offset, p.buffer_offset, p.nbytes) for p in pieces if p.nbytes)
    found: list[tuple[str, int, int, int]] = []
    for window in windows_of(pieces, window_bytes):
        assert sum(piece.nbytes for piece in window.pieces) == sum(copy.nbytes for copy in window.copies) <= window_bytes
        for copy in window.copies:
            for piece in window.pieces:
                start = max(copy.ring_offset, piece.buffer_offset)
                end = min(copy.ring_offset + copy.nbytes, piece.buffer_offset + piece.nbytes)
                if start < end:
                    slab_offset = copy.slab_offset + start - copy.ring_offset
                    found.append((*map(str, origin_of(piece, start)[:1]), origin_of(piece, start)[1], slab_offset, end - start))
    assert joined(found) == joined(expected)


def joined(spans: list[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    """Neighbours in file and slab as one."""
    result: list[tuple[str, int, int, int]] = []
    for path, at, place, nbytes in sorted(spans):
        if result and result[-1][:3] == (path, at - result[-1][3], place - result[-1][3]):
            result[-1] = (*result[-1][:3], result[-1][3] + nbytes)
        else:
            result.append((path, at, place, nbytes))
    return result


@given(stored())
def test_all_but_the_ends_of_large_stretches_is_read_directly(weights: list[Stored]) -> None:
    slab = slab_of(weights)
    pieces = [Piece(e.origin.path, e.origin.offset_bytes, e.offset_bytes, e.nbytes) for e in slab.entries]
    for window in windows_of(pieces, 2**30):
        direct = sum(chunk.nbytes for chunk in chunks_of(window.pieces, 0) if chunk.is_direct)
        large = [p for p in window_stretches(pieces) if p >= LEAST_DIRECT_BYTES + 2 * DIRECT_ALIGNMENT_BYTES]
        assert direct >= sum(large) - 2 * DIRECT_ALIGNMENT_BYTES * len(large)


def window_stretches(pieces: list[Piece]) -> list[int]:
    """Bytes of each unbroken stretch of a file."""
    sizes: list[int] = []
    end: tuple[Path, int] | None = None
    for piece in sorted((p for p in pieces if p.nbytes), key=lambda p: (str(p.path), p.file_offset)):
        if end == (piece.path, piece.file_offset):
            sizes[-1] += piece.nbytes
        else:
            sizes.append(piece.nbytes)
        end = (piece.path, piece.file_offset + piece.nbytes)
    return sizes


def test_a_block_as_large_as_a_ring_buffer_is_one_window_wherever_it_lies() -> None:
    for offset in (0, 8, 4095):
        (window,) = windows_of([Piece(Path("f"), offset, 0, WINDOW_BYTES)], WINDOW_BYTES)
        assert sum(piece.nbytes for piece in window.pieces) == WINDOW_BYTES
        assert len(window.copies) <= 2
