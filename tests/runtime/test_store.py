"""The packed store: what is kept is found again, what is damaged is made again, and nothing is ever taken for something else."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overflowml_core.errors import DamagedPack, ReadFault
from overflowml_core.runtime import homes, kept_file, kept_folder, slab_content
from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, Title
from overflowml_core.runtime.kept_folder import KeptFolder
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab_content import Content
from overflowml_core.runtime.store import PackedStore
from tests.runtime.build import TIMEOUT_S, job, on_meta, rows, same, save, stack, twice
from tests.runtime.conftest import Virtual
from tests.runtime.stores import FILE_BYTES, NBYTES, Store, content, kept, names, slab
from tests.runtime.test_streaming import call

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packed"


@pytest.fixture
def opened(folder: Path) -> Callable[..., Store]:
    return lambda cap_bytes=None: Store(folder, cap_bytes)


# ---- keeping


def test_a_kept_slab_is_not_made_again(folder: Path, opened: Callable[..., Store]) -> None:
    first = opened()
    packed = first.get()
    assert (packed.piece.path.parent, packed.piece.file_offset % 4096, packed.piece.nbytes) == (folder, 0, NBYTES)
    first.get()
    first.close()
    second = opened()
    second.get()
    assert (first.made, second.made) == ([0], [])
    assert names(folder) == [".slab"]
    assert packed.piece.path.stat().st_size == FILE_BYTES
    if sys.platform != "win32":
        assert stat.S_IMODE(packed.piece.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_writing_to_a_view_changes_no_file(opened: Callable[..., Store]) -> None:
    opened().get().view.zero_()
    second = opened()
    second.get()
    assert second.made == []


def test_slabs_of_live_weights_leave_no_file(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    packed = [store.get(number, keep=False) for number in range(3)]
    store.get(0, keep=False)
    assert store.made == [0, 1, 2, 0]
    assert [p.piece.file_offset for p in packed] == [0, 8192, 16384]
    store.close()
    store.close()
    assert list(folder.iterdir()) == []


def test_what_a_slab_is_made_from_may_fail_and_leaves_nothing(folder: Path, opened: Callable[..., Store]) -> None:
    def make(buffer: torch.Tensor) -> None:
        raise ReadFault("model.safetensors", 0, 10, 5)

    store = opened()
    with pytest.raises(ReadFault):
        store.store.slab(NBYTES, make, content())
    assert list(folder.iterdir()) == []
    store.get()
    assert names(folder) == [".slab"]


def test_a_source_that_changes_meanwhile_is_not_kept(folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Content, "holds_in", lambda self, reader: False)
    opened().get()
    assert names(folder) == []


# ---- damage


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "slab": lambda path: _flip(path, SLAB_OFFSET_BYTES + NBYTES // 2),
    "page": lambda path: _flip(path, 100),
    "cut": lambda path: os.truncate(path, FILE_BYTES - 1),
    "longer": lambda path: os.truncate(path, FILE_BYTES + 1),
    "page alone": lambda path: os.truncate(path, SLAB_OFFSET_BYTES),
    "empty": lambda path: os.truncate(path, 0),
    "another's": lambda path: os.replace(path.with_stem(content(1).key), path),
    "another size": lambda path: path.write_bytes(kept_file.Header(content().key, 8, 0, 0, Title("", "", "")).encode() + bytes(8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_slab_is_made_again_with_a_warning_that_names_it(
    damage: str, opened: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    first.get(1)
    path = first.get(0).piece.path
    first.close()
    DAMAGES[damage](path)
    second = opened()
    second.get(0)
    assert second.made == [0]
    assert [record.args[0] for record in caplog.records if record.levelno == logging.WARNING] == [path]
    third = opened()
    third.get(0)
    assert third.made == []


def test_a_copy_of_the_folder_is_read_through_and_then_trusted(
    tmp_path: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = opened().get().piece.path
    other = tmp_path / "copy"
    other.mkdir()
    (other / path.name).write_bytes(path.read_bytes())
    read: list[object] = []
    true = kept_file.check_slab
    monkeypatch.setattr(kept_folder, "check_slab", lambda *args: (read.append(args), true(*args)))
    for _ in range(2):
        store = Store(other)
        store.get()
        assert store.made == []
    assert len(read) == 1


def _damage_silently(path: Path) -> None:
    """As a disk does it: other bytes, and nothing says that they changed."""
    before = path.stat()
    _flip(path, SLAB_OFFSET_BYTES + before.st_size // 2 - SLAB_OFFSET_BYTES // 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _unread(folder: Path) -> tuple[torch.nn.Module, Path]:
    """A model whose weights are used in another dtype than its file has, and the file."""
    module = stack(4, 64)
    return module, save({name: p.bfloat16() for name, p in module.named_parameters()}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["host", "virtual"])
def test_bytes_that_come_wrong_from_the_disk_are_never_computed_with(kind: str, tmp_path: Path, folder: Path, vgpu: Virtual) -> None:
    device = vgpu.device if kind == "virtual" else None
    module, path = _unread(tmp_path)
    twin, loading = on_meta(module, path, torch.float32)
    with torch.no_grad(), job(twin, device, tier="disk", loading=loading).attached(folder):
        assert len(kept(folder)) >= 2
        for file in folder.glob("*.slab"):
            _damage_silently(file)
        for _ in range(2):
            with pytest.raises(DamagedPack) as caught:
                twice(lambda: call(twin, rows(64)) if device else twin(rows(64)))
            assert not caught.value.path.exists()


def test_the_second_load_of_a_model_reads_the_kept_slabs_alone(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_content, "_SETTLED_NS", -(10**18))
    module, path = _unread(tmp_path)
    outputs = []
    for _ in range(2):
        twin, loading = on_meta(module, path, torch.float32)
        with torch.no_grad(), job(twin, loading=loading).attached(folder):
            outputs += [twin(rows(64)), twin(rows(64))]
        monkeypatch.setattr(homes, "fill", lambda *args: pytest.fail("read from the model's own file"))
    assert all(same(output, outputs[0]) for output in outputs)
    assert same(outputs[0], module.bfloat16().float()(rows(64)))


# ---- several processes


def _forked(work: Callable[[], object]) -> int:
    """Do work in a child process, which has imported everything already; its status is 0 when the work is done."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _slowly(folder: Path, mark: Path, seconds: float, go: Path | None = None) -> None:
    """Have a slab as another process has it, which takes its time to make it."""

    def make(buffer: torch.Tensor) -> None:
        mark.touch()
        time.sleep(seconds)
        buffer.copy_(slab())

    _wait_for(lambda: go is None or go.exists())
    packed = PackedStore(folder, FileReader()).slab(NBYTES, make, content())
    assert torch.equal(packed.view, slab())


@forks
def test_processes_that_want_the_same_slab_at_once_are_all_right(tmp_path: Path, folder: Path) -> None:
    marks = [tmp_path / f"made-{index}" for index in range(4)]
    children = [_forked(lambda mark=mark: _slowly(folder, mark, 0.3, tmp_path / "go")) for mark in marks]
    (tmp_path / "go").touch()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert names(folder) == [".slab"]
    assert sum(mark.exists() for mark in marks) == 1


@forks
@pytest.mark.parametrize("moment", ["making", "writing"])
def test_a_writer_that_is_killed_leaves_nothing_that_counts(
    moment: str, tmp_path: Path, folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = os.write

    def write_a_little(descriptor: int, data: memoryview) -> int:
        true(descriptor, data[:100])
        time.sleep(TIMEOUT_S)
        return 0

    with monkeypatch.context() as patched:
        if moment == "writing":
            patched.setattr(kept_file.os, "write", write_a_little)
        child = _forked(lambda: _slowly(folder, tmp_path / "made", TIMEOUT_S if moment == "making" else 0))
    least = 100 if moment == "writing" else 0
    _wait_for(lambda: (tmp_path / "made").exists() and any(path.stat().st_size >= least for path in folder.glob("*.part")))
    KeptFolder(folder).clean()
    assert ".part" in names(folder)  # it lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert kept(folder) == []
    assert ".part" in names(folder)
    store = opened()
    store.get()
    assert store.made == [0]
    assert names(folder) == [".slab"]
