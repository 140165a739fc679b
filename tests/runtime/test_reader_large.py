"""Large reads: past the page cache where memory and file are aligned alike, several at a time, and with nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overflowml_core.errors import ReadFault
from overflowml_core.runtime.chunks import CHUNK_BYTES, DIRECT_ALIGNMENT_BYTES, Piece
from overflowml_core.runtime.pages import whole_pages
from overflowml_core.runtime.reader import IN_FLIGHT, FileReader

HEADER_BYTES = 1234
LARGE_BYTES = 3 * CHUNK_BYTES + 567
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(HEADER_BYTES + LARGE_BYTES + 89)


@pytest.fixture
def large(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "large"
    path.write_bytes(content)
    return path


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every read past the page cache."""
    made: list[tuple[int, int]] = []
    true = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        got = true(descriptor, views, offset)
        if is_direct(descriptor):
            made.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def is_direct(descriptor: int) -> bool:
    import fcntl  # where there are vectored reads, there is this

    return bool(DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def has_direct_reads(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | DIRECT))
    except OSError:
        return False
    return bool(DIRECT)


def placed(shift: int) -> tuple[torch.Tensor, int, Callable[[Path], Piece]]:
    """A buffer in which the large piece lies so many bytes off the place where it could be read directly."""
    start = (HEADER_BYTES + shift) % DIRECT_ALIGNMENT_BYTES
    buffer = whole_pages(LARGE_BYTES + 2 * DIRECT_ALIGNMENT_BYTES)
    return buffer, start, lambda path: Piece(path, HEADER_BYTES, start, LARGE_BYTES)


@pytest.mark.parametrize("shift", [0, 1, 64, 512])
def test_every_byte_arrives_whatever_the_alignment_and_nothing_beside_it_is_touched(
    shift: int, large: Path, content: bytes, direct_calls: list[tuple[int, int]]
) -> None:
    buffer, start, piece = placed(shift)
    buffer.fill_(7)
    with FileReader() as reader:
        reader.read([piece(large)], buffer)
        assert reader.bytes_read == LARGE_BYTES
    found = buffer.numpy()
    assert found[start : start + LARGE_BYTES].tobytes() == content[HEADER_BYTES : HEADER_BYTES + LARGE_BYTES]
    assert set(found[:start]) | set(found[start + LARGE_BYTES :]) == {7}
    if has_direct_reads(large):
        # All of it but the ends that share a page with something else, and only where memory and file are aligned alike.
        expected = sum(nbytes for _, nbytes in direct_calls)
        assert (expected > LARGE_BYTES - 2 * DIRECT_ALIGNMENT_BYTES) is (shift == 0)
        assert (len(direct_calls) == 0) is (shift != 0)


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.open

    def refuses(path: object, flags: int, *rest: int) -> int:
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)


def refuse_at_read(monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.preadv

    def refuses(descriptor: int, views: list[memoryview], offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", refuses)


def stop_short(monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, views, at: true(d, [views[0][: max(len(views[0]) // 3, 1)]], at))


@pytest.mark.parametrize("trouble", [refuse_at_open, refuse_at_read, stop_short])
def test_file_systems_without_direct_reads_are_read_through_the_page_cache(
    trouble: Callable[[pytest.MonkeyPatch], None], large: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble(monkeypatch)
    buffer, start, piece = placed(0)
    with FileReader() as reader:
        for _ in range(2):
            buffer.zero_()
            reader.read([piece(large)], buffer)
            assert buffer.numpy()[start : start + LARGE_BYTES].tobytes() == content[HEADER_BYTES : HEADER_BYTES + LARGE_BYTES]
        if trouble is not stop_short:
            assert not reader.reads_direct(large)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory")
def test_a_file_system_in_memory_is_read(content: bytes) -> None:
    buffer, start, piece = placed(0)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file, FileReader() as reader:
        file.write(content)
        file.flush()
        reader.read([piece(Path(file.name))], buffer)
    assert buffer.numpy()[start : start + LARGE_BYTES].tobytes() == content[HEADER_BYTES : HEADER_BYTES + LARGE_BYTES]


def test_a_file_that_is_gone_or_replaced_is_read_directly_as_it_was(large: Path, content: bytes, tmp_path: Path) -> None:
    buffer, start, piece = placed(0)
    with FileReader() as reader:
        reader.hold([piece(large)])
        other = tmp_path / "other"
        other.write_bytes(b"x" * len(content))
        os.replace(other, large)
        reader.read([piece(large)], buffer)
    assert buffer.numpy()[start : start + LARGE_BYTES].tobytes() == content[HEADER_BYTES : HEADER_BYTES + LARGE_BYTES]


def test_a_nameless_file_that_grew_after_it_was_adopted_is_read(tmp_path: Path, content: bytes) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as file, FileReader() as reader:
        reader.adopt(tmp_path / "nameless", file.fileno())
        file.write(content)
        file.flush()
        buffer = whole_pages(len(content))
        reader.read([Piece(tmp_path / "nameless", 0, 0, len(content))], buffer)
        assert reader.reads_direct(tmp_path / "nameless") is has_direct_reads_without_name(tmp_path)
    assert buffer.numpy().tobytes() == content


def has_direct_reads_without_name(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return has_direct_reads(Path(file.name)) and os.path.exists("/proc/self/fd")


def test_large_reads_are_in_flight_together(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, here = os.preadv, threading.Barrier(min(IN_FLIGHT, 3))

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if len(views[0]) == CHUNK_BYTES:
            here.wait(60)  # breaks where fewer come
        return true(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = whole_pages(3 * CHUNK_BYTES)
    with FileReader() as reader:
        reader.read([Piece(large, 0, 0, 3 * CHUNK_BYTES)], buffer)


def test_after_a_fault_no_thread_writes_into_the_buffer_any_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if offset < CHUNK_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.05)
        return true(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = whole_pages(3 * CHUNK_BYTES)
    with FileReader() as reader:
        with pytest.raises(ReadFault, match="Input/output error"):
            reader.read([Piece(large, 0, 0, 3 * CHUNK_BYTES)], buffer)
        buffer.zero_()
        time.sleep(0.2)
        assert not buffer.any()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_readers_leave_no_file_open_closed_or_forgotten(large: Path) -> None:
    before = open_files()
    with FileReader() as reader:
        reader.read([Piece(large, 0, 0, 4)], torch.zeros(4, dtype=torch.uint8))
    assert open_files() == before
    reader.close()
    forgotten = FileReader()
    forgotten.read([Piece(large, 0, 0, 4)], torch.zeros(4, dtype=torch.uint8))
    del forgotten
    assert open_files() == before


def reading_threads() -> int:
    return sum(thread.name.startswith("overflowml-read") for thread in threading.enumerate())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("forgotten", [False, True])
def test_threads_and_descriptors_end_with_the_reader(forgotten: bool, large: Path) -> None:
    before, threads = open_files(), reading_threads()
    reader, (buffer, _, piece) = FileReader(), placed(0)
    reader.read([piece(large)], buffer)
    assert reading_threads() > threads
    assert open_files() == before + (2 if has_direct_reads(large) else 1)
    if not forgotten:
        reader.close()
    del reader
    gc.collect()
    deadline = time.monotonic() + 60
    while reading_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (open_files(), reading_threads()) == (before, threads)


def test_whole_pages_start_on_a_page_and_are_given_back() -> None:
    assert whole_pages(0).numel() == 0
    pages = [whole_pages(n) for n in (1, 4096, 5000)]
    assert all(tensor.data_ptr() % DIRECT_ALIGNMENT_BYTES == 0 and not tensor.any() for tensor in pages)
    with pytest.raises(MemoryError, match="bytes of RAM"):
        whole_pages(2**62)
