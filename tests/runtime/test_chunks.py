"""How reads are cut: each byte once, direct reads aligned, none larger than a chunk."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.runtime.chunks import CHUNK_BYTES, DIRECT_ALIGNMENT_BYTES, LEAST_DIRECT_BYTES, Chunk, Piece, chunks_of

SIZES = st.one_of(st.integers(0, 9000), st.sampled_from([LEAST_DIRECT_BYTES - 1, LEAST_DIRECT_BYTES + 9000, 2 * CHUNK_BYTES + 4096]))


@st.composite
def pieces_anywhere(draw: st.DrawFn) -> list[Piece]:
    """Pieces that overlap neither in a file nor in the buffer, some of which touch in both."""
    pieces: list[Piece] = []
    ends = [draw(st.integers(0, 5000)), draw(st.integers(0, 5000))]
    place = draw(st.sampled_from([0, 8, 4096]))
    for nbytes in draw(st.lists(SIZES, max_size=6)):
        index = draw(st.integers(0, 1))
        ends[index] += draw(st.sampled_from([0, 0, 1, 4096]))
        place += draw(st.sampled_from([0, 0, 5, (ends[index] - place) % DIRECT_ALIGNMENT_BYTES]))
        pieces.append(Piece(Path(f"f{index}"), ends[index], place, nbytes))
        ends[index] += nbytes
        place += nbytes
    return draw(st.permutations(pieces))


def spans(pieces: list[Piece]) -> list[tuple[str, int, int, int]]:
    """What goes where, independent of how it is cut: (file, file offset, buffer offset, bytes), neighbours in both as one."""
    joined: list[tuple[str, int, int, int]] = []
    for piece in sorted((p for p in pieces if p.nbytes), key=lambda p: (str(p.path), p.file_offset)):
        if joined:
            path, at, place, nbytes = joined[-1]
            if (path, at + nbytes, place + nbytes) == (str(piece.path), piece.file_offset, piece.buffer_offset):
                joined[-1] = (path, at, place, nbytes + piece.nbytes)
                continue
        joined.append((str(piece.path), piece.file_offset, piece.buffer_offset, piece.nbytes))
    return joined


def filled(chunk: Chunk) -> list[Piece]:
    found, at = [], chunk.file_offset
    for place, nbytes in chunk.places:
        found.append(Piece(chunk.path, at, place, nbytes))
        at += nbytes
    return found


@given(pieces_anywhere(), st.sampled_from([0, 64, 4096, 2**40 + 8192]))
def test_every_byte_is_read_once_to_its_place(pieces: list[Piece], address: int) -> None:
    chunks = chunks_of(pieces, address)
    parts = [part for chunk in chunks for part in filled(chunk)]
    assert sum(part.nbytes for part in parts) == sum(piece.nbytes for piece in pieces)
    assert spans(parts) == spans(pieces)


@given(pieces_anywhere(), st.sampled_from([0, 64, 4096]))
def test_direct_reads_are_aligned_and_no_read_is_larger_than_a_chunk(pieces: list[Piece], address: int) -> None:
    for chunk in chunks_of(pieces, address):
        assert 0 < chunk.nbytes <= CHUNK_BYTES
        assert len(chunk.places) <= 512
        if chunk.is_direct:
            ((place, nbytes),) = chunk.places
            assert not any(number % DIRECT_ALIGNMENT_BYTES for number in (chunk.file_offset, address + place, nbytes))


def test_what_could_be_read_directly_is_but_for_less_than_a_page_at_its_ends() -> None:
    piece = Piece(Path("f"), 100, 100, 2 * CHUNK_BYTES)
    chunks = chunks_of([piece], 8192)
    assert sum(c.nbytes for c in chunks if c.is_direct) > piece.nbytes - 2 * DIRECT_ALIGNMENT_BYTES
    assert [c.is_direct for c in chunks] == [False, True, True, False]
    assert not any(c.is_direct for c in chunks_of([piece], 8192 + 64))


def test_small_pieces_are_not_worth_a_direct_read() -> None:
    assert chunks_of([Piece(Path("f"), 0, 0, LEAST_DIRECT_BYTES - 1)], 0) == [
        Chunk(Path("f"), 0, ((0, LEAST_DIRECT_BYTES - 1),), is_direct=False)
    ]
    assert chunks_of([], 0) == []
