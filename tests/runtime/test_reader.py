"""Reads: few calls, exact ranges, and an error that says where a file let us down."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overflowml_core.errors import FileChanged, ReadFault
from overflowml_core.runtime import open_file
from overflowml_core.runtime.chunks import LEAST_DIRECT_BYTES, Piece
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import lay_out
from overflowml_core.runtime.source import pieces_of
from overflowml_core.runtime.structure import dissect
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


# ---- files that change

DAY_NS = 86_400 * 10**9


def age(path: Path) -> None:
    """Make a file a day older, so that any later change shows in its time."""
    then = path.stat().st_mtime_ns - DAY_NS
    os.utime(path, ns=(then, then))


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"?")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"?")


@pytest.mark.parametrize("change", [write_in_place, append, os.utime])
def test_a_file_that_somebody_wrote_to_is_an_error_that_says_what_changed(change: Callable[[Path], None], data: Path) -> None:
    age(data)
    before, buffer = data.stat(), torch.zeros(4, dtype=torch.uint8)
    with FileReader() as reader:
        reader.hold([Piece(data, 0, 0, 4)])
        change(data)
        with pytest.raises(FileChanged, match="load the model again") as caught:
            reader.read([Piece(data, 0, 0, 4)], buffer)
        assert caught.value.path == data
        assert caught.value.before == (before.st_size, before.st_mtime_ns)
        assert caught.value.now == (data.stat().st_size, data.stat().st_mtime_ns)
        assert f"expected {before.st_size} bytes" in str(caught.value)


def test_a_file_that_is_restored_with_its_time_is_read_again(data: Path) -> None:
    age(data)
    content, times, buffer = data.read_bytes(), data.stat(), torch.zeros(4, dtype=torch.uint8)
    with FileReader() as reader:
        reader.hold([Piece(data, 0, 0, 4)])
        os.truncate(data, 2)
        with pytest.raises(ReadFault, match="expected 4 bytes at offset 0, got 2"):
            reader.read([Piece(data, 0, 0, 4)], buffer)
        data.write_bytes(content)
        os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
        reader.read([Piece(data, 4, 0, 4)], buffer)
    assert buffer.tolist() == [4, 5, 6, 7]


def test_a_small_file_takes_one_descriptor(data: Path) -> None:
    assert data.stat().st_size < LEAST_DIRECT_BYTES
    file = open_file.OpenFile(data)
    assert not file.reads_direct
    file.close()
    file.close()
