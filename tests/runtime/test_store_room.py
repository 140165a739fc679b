"""Room for packed weights: a cap, a full disk, folders that cannot be written, other users; nothing that is in use goes."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overflowml_core import environment
from overflowml_core.errors import BadSize, OverflowmlError
from overflowml_core.runtime import kept_file, kept_folder
from overflowml_core.runtime.file_lock import Lock
from overflowml_core.runtime.kept_folder import KeptFolder
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.store import PackedStore
from tests.runtime.stores import FILE_BYTES, NBYTES, Store, content, kept, slab

no_locks = pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there, and nothing is locked")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packed"


@pytest.fixture
def opened(folder: Path) -> Callable[..., Store]:
    return lambda cap_bytes=None: Store(folder, cap_bytes)


# ---- room


def _used_long_ago(folder: Path, *numbers: int) -> None:
    for age, number in enumerate(reversed(numbers), 1):
        path = folder / f"{content(number).key}.slab"
        os.utime(path, ns=(time.time_ns() - age * 10**12, path.stat().st_mtime_ns))


def test_what_was_not_used_for_longest_goes_when_the_cap_is_reached(folder: Path, opened: Callable[..., Store]) -> None:
    for number in range(3):
        store = opened(3 * FILE_BYTES)
        store.get(number)
        store.close()
    gc.collect()
    _used_long_ago(folder, 0, 1, 2)
    opened(3 * FILE_BYTES).get(0)  # so that 1 is the one
    opened(3 * FILE_BYTES).get(3)
    assert kept(folder) == [0, 2, 3]


@no_locks
def test_slabs_in_use_are_not_evicted_and_what_finds_no_room_is_not_kept(
    folder: Path, opened: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    user = opened(2 * FILE_BYTES)
    views = [user.get(number).view for number in range(2)]
    other = opened(2 * FILE_BYTES)
    for number in range(2, 4):
        other.get(number)
    assert kept(folder) == [0, 1]
    assert len([record for record in caplog.records if "OVERFLOWML_CACHE_SIZE" in record.message]) == 1
    user.close()
    assert KeptFolder(folder).clear() == (0, 0)
    assert all(torch.equal(view, slab(number)) for number, view in enumerate(views))
    views.clear()
    gc.collect()
    opened(2 * FILE_BYTES).get(4)
    assert len(kept(folder)) == 2
    assert 4 in kept(folder)


def test_some_of_the_disk_stays_free_whatever_the_cap(folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kept_folder.shutil, "disk_usage", lambda path: kept_folder.shutil._ntuple_diskusage(10**12, 0, 2**32 + FILE_BYTES - 1)
    )
    opened(10**12).get()
    assert kept(folder) == []
    monkeypatch.setattr(kept_folder.shutil, "disk_usage", lambda path: kept_folder.shutil._ntuple_diskusage(10**12, 0, 2**32 + FILE_BYTES))
    store = opened()
    store.get()
    assert kept(folder) == [0]
    assert KeptFolder(folder).cap_bytes == 10**12 // 4


def test_the_cap_is_taken_from_the_environment(folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.CACHE_SIZE, "3MiB")
    assert environment.cache_size_bytes() == 3 * 2**20
    monkeypatch.setenv(environment.CACHE_SIZE, "0")
    opened().get()
    assert list(folder.iterdir()) == []
    monkeypatch.setenv(environment.CACHE_SIZE, "lots")
    with pytest.raises(BadSize, match="OVERFLOWML_CACHE_SIZE"):
        opened()


# ---- a full disk, a folder that cannot be written


def _full_for(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """The next writes fail in the middle, as on a full disk."""
    left, true = [failures], os.write

    def write(descriptor: int, data: memoryview) -> int:
        if left[0] and len(data) == NBYTES:
            left[0] -= 1
            true(descriptor, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(descriptor, data)

    monkeypatch.setattr(kept_file.os, "write", write)


@pytest.mark.parametrize("keep", [True, False])
def test_on_a_full_disk_kept_slabs_make_room(
    keep: bool, folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened().get(1)
    gc.collect()
    _full_for(monkeypatch, 1)
    opened().get(0, keep)
    assert kept(folder) == ([0] if keep else [])
    assert "disk is full" in caplog.text


@pytest.mark.parametrize("keep", [True, False])
def test_a_disk_that_stays_full_is_an_error_that_names_the_way_out(
    keep: bool, folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    _full_for(monkeypatch, 2)
    with pytest.raises(OverflowmlError, match=r"no room for 4.9 KiB.*OVERFLOWML_CACHE") as caught:
        store.get(0, keep)
    assert str(folder) in str(caught.value)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    store.get(0, keep)


def _make_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount that is read-only; permissions alone do not stop a superuser."""
    true = os.open

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_to_read(path: object, flags: int, *rest: int) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else true(path, flags, *rest)  # type: ignore[return-value, arg-type]

    for name in ("utime", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "open", open_to_read)


def test_a_folder_that_cannot_be_written_still_gives_what_it_has(
    folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened().get(0)
    store = opened()
    with monkeypatch.context() as patched:
        _make_read_only(patched)
        store.get(0)
        for keep in (True, False):
            with pytest.raises(OverflowmlError, match=r"cannot hold packed weights.*OVERFLOWML_CACHE") as caught:
                store.get(1, keep)
            assert str(folder) in str(caught.value)
    assert store.made == []  # it fails before the work
    assert kept(folder) == [0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OverflowmlError, match="OVERFLOWML_CACHE"), FileReader() as reader:
        PackedStore(tmp_path / "file" / "below", reader)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only a superuser gives files away")
def test_a_file_of_another_user_is_not_used(folder: Path, opened: Callable[..., Store]) -> None:
    path = opened().get().piece.path
    os.chown(path, 12345, 12345)
    store = opened()
    store.get()
    assert store.made == [0]


def test_a_file_system_without_locks_is_served_too(folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("share", "take"):
        monkeypatch.setattr(kept_folder, name, lambda descriptor: Lock.NONE)
    for expected in ([0], []):
        store = opened()
        store.get()
        assert store.made == expected
    part = folder / f"{content().key}.x.part"
    part.touch()
    KeptFolder(folder).clean()
    assert part.exists()  # it may be somebody's work
    os.utime(part, (0, 0))
    KeptFolder(folder).clean()
    assert not part.exists()


def test_a_forgotten_store_keeps_no_file_open(folder: Path, opened: Callable[..., Store]) -> None:
    opened().get()
    opened().get(1, keep=False)
    gc.collect()
    with contextlib.suppress(FileNotFoundError):
        assert not [name for name in os.listdir("/proc/self/fd") if str(folder) in os.path.realpath(f"/proc/self/fd/{name}")]
    assert KeptFolder(folder).clear()[0] == 1


def test_waiting_for_another_process_has_an_end(folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_folder, "_LONGEST_TURN_S", 0.05)
    store = opened()
    with KeptFolder(folder).turn(content().key):
        store.get()
    assert store.made == [0]
