"""Models in the cache folder are whole or absent, and written once."""

from __future__ import annotations

import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from overflowml_core.cli.demo import cache
from overflowml_core.cli.demo.faults import DemoUnavailable
from overflowml_core.errors import BadCheckpoint


def write_model(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "part" / "weights.bin").write_bytes(b"w" * 1000)


def hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_written_once_and_used_again(tmp_path):
    folder = tmp_path / "cache" / "model"
    assert cache.build_once(folder, 1000, write_model)
    assert cache.is_complete(folder)
    assert not cache.build_once(folder, 1000, lambda _: pytest.fail("written twice"))
    assert not hidden(folder.parent)


def test_nothing_appears_before_the_last_file_is_written(tmp_path):
    folder = tmp_path / "model"

    def build(work: Path) -> None:
        write_model(work)
        assert work != folder
        assert not folder.exists()

    cache.build_once(folder, 0, build)


def test_interrupted_build_leaves_nothing_and_is_redone(tmp_path):
    folder = tmp_path / "model"

    def interrupted(work: Path) -> None:
        (work / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(folder, 0, interrupted)
    assert not folder.exists()
    assert not hidden(tmp_path)
    assert cache.build_once(folder, 0, write_model)


@pytest.mark.parametrize("damage", ["cut", "lost", "unmarked"])
def test_damaged_folder_is_replaced(tmp_path, damage):
    folder = tmp_path / "model"
    cache.build_once(folder, 0, write_model)
    if damage == "cut":
        (folder / "part" / "weights.bin").write_bytes(b"w" * 999)
    elif damage == "lost":
        (folder / "config.json").unlink()
    else:
        (folder / cache._MANIFEST).unlink()
    assert not cache.is_complete(folder)
    assert cache.build_once(folder, 0, write_model)
    assert cache.is_complete(folder)
    assert (folder / "part" / "weights.bin").stat().st_size == 1000
    assert not hidden(tmp_path)


def test_of_two_at_the_same_time_one_wins_and_both_are_served(tmp_path):
    folder = tmp_path / "model"
    together = threading.Barrier(2)
    faults: list[BaseException] = []

    def build(work: Path) -> None:
        write_model(work)
        together.wait(timeout=60)

    def one() -> None:
        try:
            cache.build_once(folder, 0, build)
        except BaseException as error:  # noqa: BLE001 -- handed to the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert cache.is_complete(folder)
    assert not hidden(tmp_path)


def test_abandoned_work_is_removed_and_recent_work_is_left(tmp_path):
    import os

    old, new = tmp_path / ".model.old", tmp_path / ".model.new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    cache.build_once(tmp_path / "model", 0, write_model)
    assert not old.exists()
    assert new.exists()


def test_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 10))
    with pytest.raises(DemoUnavailable, match="OVERFLOWML_CACHE"):
        cache.build_once(tmp_path / "model", 1000, lambda _: pytest.fail("started"))
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_is_one_line_with_a_way_out(tmp_path):
    def build(work: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DemoUnavailable, match=r"No space left on device.*OVERFLOWML_CACHE"):
        cache.build_once(tmp_path / "model", 0, build)
    assert not list(tmp_path.iterdir())


def safetensors(path: Path, sizes: list[int]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for index, size in enumerate(sizes):
        header[f"t{index}"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def test_weights_are_counted_over_all_files_by_their_headers(tmp_path):
    (tmp_path / "sub").mkdir()
    safetensors(tmp_path / "a.safetensors", [10, 20])
    safetensors(tmp_path / "sub" / "b.safetensors", [300])
    assert cache.weights_bytes(tmp_path) == 330


def test_damaged_header_is_an_error_of_the_project(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(BadCheckpoint):
        cache.weights_bytes(tmp_path)


def test_folder_without_weights_is_an_error_of_the_project(tmp_path):
    with pytest.raises(BadCheckpoint):
        cache.weights_bytes(tmp_path)
