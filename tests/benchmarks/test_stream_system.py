"""Memory limits, counters and read rates that the disk part rests on."""

from __future__ import annotations

import errno
import mmap
import os
import sys

import pytest

pytest.importorskip("torch")

import stream_rate
from stream_side import _unmap_pages
from stream_system import Cage, anonymous_bytes_of, drop_cache, make_cage, read_bytes_of

LIMIT_BYTES = 2_500_000_000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and Linux's page cache")


def _files(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_group_of_version_1_is_made_below_the_own_one(tmp_path):
    _files(tmp_path / "memory", memory__limit_in_bytes="0")
    _files(tmp_path / "memory" / "job")
    cage = make_cage("cage", LIMIT_BYTES, tmp_path, own="4:memory:/job\n0::/\n")
    assert cage == Cage(tmp_path / "memory" / "job" / "cage", 1, LIMIT_BYTES)
    assert (cage.folder / "memory.limit_in_bytes").read_text() == str(LIMIT_BYTES)


def test_a_group_of_version_2_is_made_where_the_controller_may_be_passed_on(tmp_path):
    _files(tmp_path, cgroup__controllers="cpu memory", cgroup__subtree_control="cpu")
    cage = make_cage("cage", LIMIT_BYTES, tmp_path, own="0::/\n")
    assert cage is not None
    assert cage.version == 2
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    assert (cage.folder / "memory.max").read_text() == str(LIMIT_BYTES)


def test_no_group_where_there_are_none_or_one_of_that_name_is_there(tmp_path):
    assert make_cage("cage", LIMIT_BYTES, tmp_path, own="0::/\n") is None
    _files(tmp_path / "memory" / "cage")
    _files(tmp_path / "memory", memory__limit_in_bytes="0")
    assert make_cage("cage", LIMIT_BYTES, tmp_path, own="4:memory:/\n") is None


def test_a_group_that_is_gone_is_removed_in_peace_and_tells_no_peak(tmp_path):
    cage = Cage(tmp_path / "gone", 1, LIMIT_BYTES)
    cage.remove()
    assert cage.peak_bytes() is None


@linux
def test_anonymous_memory_grows_by_what_is_taken():
    before = anonymous_bytes_of()
    taken = mmap.mmap(-1, 2**25)
    taken[:] = b"x" * 2**25
    assert anonymous_bytes_of() - before >= 2**25
    taken.close()


@linux
def test_counters_of_no_process_are_none():
    assert anonymous_bytes_of(2**22 + 1) is None
    assert read_bytes_of(2**22 + 1) is None


@linux
def test_pages_of_a_mapped_file_are_let_go_and_come_back(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(2**16))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert _unmap_pages({str(file)}) == 1
        drop_cache([file])
        assert mapped[:] == file.read_bytes()
    assert _unmap_pages({str(file)}) == 0


@pytest.mark.parametrize("in_flight", [1, 4])
def test_every_chunk_is_read_once(tmp_path, monkeypatch, in_flight):
    files = [tmp_path / "a", tmp_path / "b"]
    for file, chunks in zip(files, (5, 2), strict=True):
        file.write_bytes(b"x" * chunks * 2**16)
    seen = []
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: seen.append(offset) or plain(descriptor, buffers, offset))
    assert stream_rate.read_rate(files, in_flight, chunk_bytes=2**16) > 0
    assert sorted(seen) == sorted([2**16 * number for number in (0, 1, 2, 3, 4, 0, 1)])


def test_a_fault_of_a_reader_is_the_rate_s(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 2**16)

    def refuse(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(OSError, match="broken disk"):
        stream_rate.read_rate([file], 2, chunk_bytes=2**16)
