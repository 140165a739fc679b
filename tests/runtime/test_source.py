"""Reads: few calls, exact ranges, and an error that says where a file let us down."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import OverflowmlError, ReadFault
from overflowml_core.loading import Origin
from overflowml_core.runtime.homes import FileMaps
from overflowml_core.runtime.slab import Entry, lay_out
from overflowml_core.runtime.source import FileReader, Piece, cut, pieces_of, stored_as_is, windows
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.structure import Weight, dissect
from tests.runtime.build import on_meta, save, stack


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 4)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every vectored read."""
    made: list[tuple[int, int]] = []
    if not hasattr(os, "preadv"):
        pytest.skip("this system has no vectored reads")
    true = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        made.append((offset, sum(len(v) for v in views)))
        return true(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def read(pieces: list[Piece], nbytes: int) -> bytes:
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    with FileReader() as reader:
        reader.read(pieces, buffer)
    return bytes(buffer.numpy())


def test_neighbours_in_a_file_are_one_read_whatever_their_order(data: Path, calls: list[tuple[int, int]]) -> None:
    pieces = [Piece(data, 30, 0, 10), Piece(data, 10, 64, 20), Piece(data, 100, 32, 4), Piece(data, 40, 96, 0)]
    found = read(pieces, 128)
    assert calls == [(10, 30), (100, 4)]
    assert found[0:10] == bytes(range(30, 40))
    assert found[64:84] == bytes(range(10, 30))
    assert found[32:36] == bytes(range(100, 104))


def test_a_block_of_a_file_is_one_read(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    module = stack(3, 8, hidden=4, bias=True)
    # Written in the order of the module, as save_pretrained does for equal dtypes sorted by name.
    path = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    twin, loading = on_meta(module, path)
    for unit in dissect(twin).blocks:
        calls.clear()
        slab = lay_out(unit, loading)
        read(pieces_of(slab), slab.nbytes)
        assert len(calls) == 1, unit.name


def test_many_pieces_are_read_within_the_systems_limit_of_buffers(data: Path, calls: list[tuple[int, int]]) -> None:
    found = read([Piece(data, i, 1023 - i, 1) for i in range(1024)], 1024)
    assert found == data.read_bytes()[::-1]
    assert len(calls) == 2


def test_partial_reads_are_continued(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, views, at: true(d, [views[0][:3]], at))
    pieces = [Piece(data, 5, 0, 7), Piece(data, 12, 20, 1), Piece(data, 13, 8, 9)]
    found = read(pieces, 32)
    assert (found[0:7], found[20:21], found[8:17]) == (bytes(range(5, 12)), bytes([12]), bytes(range(13, 22)))


def test_without_vectored_reads_the_bytes_are_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    assert read([Piece(data, 5, 0, 7), Piece(data, 12, 20, 2)], 32)[20:22] == bytes([12, 13])


def test_a_short_file_is_a_fault_with_offset_and_sizes(data: Path) -> None:
    with pytest.raises(ReadFault, match="expected 100 bytes at offset 1000, got 24") as caught:
        read([Piece(data, 1000, 0, 100)], 100)
    fault = caught.value
    assert (fault.path, fault.offset, fault.expected_bytes, fault.got_bytes) == (data, 1000, 100, 24)


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ReadFault) as caught:
        read([Piece(tmp_path / "gone", 8, 0, 4)], 4)
    assert (caught.value.expected_bytes, caught.value.got_bytes) == (4, 0)


def test_a_folder_in_place_of_the_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ReadFault):
        read([Piece(tmp_path, 0, 0, 4)], 4)


def test_a_device_error_in_the_middle_is_a_fault_that_says_how_far_it_came(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, done = os.preadv, []

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if done:
            raise OSError(5, "Input/output error")
        done.append(1)
        return true(descriptor, [views[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ReadFault, match="Input/output error") as caught:
        read([Piece(data, 0, 0, 10)], 10)
    assert caught.value.got_bytes == 3


def test_an_open_reader_is_indifferent_to_renames(data: Path) -> None:
    buffer = torch.zeros(4, dtype=torch.uint8)
    with FileReader() as reader:
        reader.read([Piece(data, 0, 0, 4)], buffer)
        data.unlink()
        reader.read([Piece(data, 4, 0, 4)], buffer)
        assert reader.bytes_read == 8
    assert buffer.tolist() == [4, 5, 6, 7]


def test_a_file_that_is_held_is_read_as_it_was_even_if_nothing_was_read_before(data: Path, tmp_path: Path) -> None:
    buffer = torch.zeros(4, dtype=torch.uint8)
    with FileReader() as reader:
        reader.hold([Piece(data, 0, 0, 4)])
        other = tmp_path / "other"
        other.write_bytes(b"other")
        os.replace(other, data)
        reader.read([Piece(data, 4, 0, 4)], buffer)
    assert buffer.tolist() == [4, 5, 6, 7]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_readers_leave_no_file_open_closed_or_forgotten(data: Path) -> None:
    before = open_files()
    with FileReader() as reader:
        reader.read([Piece(data, 0, 0, 4)], torch.zeros(4, dtype=torch.uint8))
    assert open_files() == before
    reader.close()
    forgotten = FileReader()
    forgotten.read([Piece(data, 0, 0, 4)], torch.zeros(4, dtype=torch.uint8))
    del forgotten
    assert open_files() == before


# ---- mapped files


def test_writing_to_a_mapped_weight_changes_no_file(tmp_path: Path) -> None:
    module = stack(2, 8)
    path = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    before = path.read_bytes()
    twin, loading = on_meta(module, path)
    slab = lay_out(dissect(twin).blocks[0], loading)
    assert stored_as_is(slab)
    view = FileMaps().view(slab.entries[0])
    assert torch.equal(view, module.blocks[0].up.weight)
    view.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("shift", range(4))
def test_mapped_weights_are_aligned_to_their_elements(shift: int, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    values = torch.randn(5)
    path.write_bytes(b"\0" * (64 + shift) + bytes(values.numpy().tobytes()))
    view = FileMaps().view(entry_at(path, 64 + shift, values))
    assert torch.equal(view, values)
    assert view.data_ptr() % 4 == 0


def entry_at(path: Path, offset: int, values: torch.Tensor) -> Entry:
    parameter = torch.nn.Parameter(values)
    origin = Origin(path, offset, values.nbytes, "F32", tuple(values.shape))
    return Entry(Weight("w", parameter, ()), 0, values.nbytes, tuple(values.shape), values.stride(), values.dtype, origin)


@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
def test_mapping_a_damaged_file_is_a_fault(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    values = torch.randn(8)
    path.write_bytes(values.numpy().tobytes())
    entry = entry_at(path, 0, values)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 20 if damage == "short" else 0)
    with pytest.raises(ReadFault) as caught:
        FileMaps().view(entry)
    assert (caught.value.path, caught.value.offset, caught.value.expected_bytes) == (path, 0, 32)
    assert caught.value.got_bytes == (20 if damage == "short" else 0)


# ---- the packed store


def test_the_store_holds_slabs_one_after_the_other_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    store = PackedStore(folder)
    slabs = [torch.arange(n, dtype=torch.uint8) for n in (256, 0, 13)]
    pieces = [store.append(slab) for slab in slabs]
    assert [(p.file_offset, p.nbytes) for p in pieces] == [(0, 256), (256, 0), (256, 13)]
    with FileReader() as reader:
        store.open_in(reader)
        for slab, piece in zip(slabs, pieces, strict=True):
            buffer = torch.zeros(256, dtype=torch.uint8)
            reader.read([piece], buffer)
            assert torch.equal(buffer[: piece.nbytes], slab)
    store.close()
    store.close()
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OverflowmlError, match="OVERFLOWML_CACHE"):
        PackedStore(tmp_path / "file" / "below")


# ---- pure parts


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """Pieces that do not overlap in the buffer, with gaps, from files in any place."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 40)), max_size=8))
    pieces, end = [], 0
    for index, (nbytes, gap, offset) in enumerate(sizes):
        pieces.append(Piece(Path(f"f{index % 3}"), offset, end + gap, nbytes))
        end += gap + nbytes
    return pieces, end


@given(laid_out(), st.integers(1, 12))
def test_windows_of_pieces_cover_each_byte_once(laid: tuple[list[Piece], int], step: int) -> None:
    pieces, end = laid
    wanted = {p.buffer_offset + i: (p.path, p.file_offset + i) for p in pieces for i in range(p.nbytes)}
    found: dict[int, tuple[Path, int]] = {}
    for first in range(0, end, step):
        last = min(first + step, end)
        for part in cut(pieces, first, last):
            assert part.nbytes > 0
            assert part.buffer_offset >= 0
            assert part.buffer_offset + part.nbytes <= last - first
            for i in range(part.nbytes):
                place = first + part.buffer_offset + i
                assert place not in found
                found[place] = (part.path, part.file_offset + i)
    assert found == wanted


@dataclass
class _Sized:
    offset_bytes: int
    nbytes: int


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 1000))
def test_stretches_hold_whole_weights_in_order_and_no_more_than_asked(sizes: list[int], limit: int) -> None:
    entries, end = [], 0
    for size in sizes:
        entries.append(_Sized(end, size))
        end += -(-size // 512) * 512
    stretches = list(windows(entries, limit))  # type: ignore[arg-type]
    assert [e for _, _, part in stretches for e in part] == entries
    for first, last, part in stretches:
        assert (first, last) == (part[0].offset_bytes, part[-1].offset_bytes + part[-1].nbytes)
        assert last - first <= limit or len(part) == 1


def test_pieces_of_a_slab_skip_what_no_file_holds(tmp_path: Path) -> None:
    module = stack(2, 8)
    assert pieces_of(lay_out(dissect(module).blocks[0], None)) == []
