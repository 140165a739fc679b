"""The folder of a run: killed at every one of its writes and gone on with, every picture is there once and as it would have been."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from PIL import Image

from overflowml_core.cli.running import folder as folder_module
from overflowml_core.cli.running import runner
from overflowml_core.cli.running.folder import LOCK, MANIFEST, BadFolder, OtherRun, RunFolder
from overflowml_core.cli.running.prompts import Prompt
from overflowml_core.cli.running.runner import Done, Job, run_job
from overflowml_core.cli.running.settings import Settings
from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits

COUNT, BATCH = 5, 2


class Painter:
    """Stands for a pipeline. Its pictures depend on the seed and, as those of kernels may, on who is computed at once."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.drawn: list[list[int]] = []
        self.attached = 0
        self.before_draw: Callable[[], None] = lambda: None

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def best_batch(self, prompts: Sequence[Prompt], limits: Limits) -> int:
        return BATCH

    def attach(self, prompts: Sequence[Prompt], batch: int, limits: Limits) -> None:
        self.attached += 1

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Any]:
        self.before_draw()
        if len(seeds) > self.room:
            raise MemoryError("no room")
        self.drawn.append(list(seeds))
        return [Image.new("RGB", (4, 4), (seed % 256, len(seeds), seeds[0] % 256)) for seed in seeds]


@pytest.fixture
def painter(monkeypatch) -> Painter:
    made = Painter()
    monkeypatch.setattr(runner, "open_pipeline", lambda *arguments: made)
    return made


def job(count: int = COUNT, seed: int | None = 100, batch: int | None = None, **settings: Any) -> Job:
    prompts = tuple(Prompt(f"picture {index}") for index in range(count))
    return Job(Path("pipeline"), prompts, Settings("digest", **settings), Limits(), seed, batch)


def go(path: Path, what: Job) -> Done:
    with RunFolder.opened(path) as opened:
        return run_job(what, opened, lambda *_: None)


def pictures(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(path.glob("*.png"))}


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / MANIFEST).read_text().splitlines()[1:]]


def test_a_run_keeps_every_picture_and_says_so(tmp_path, painter):
    done = go(tmp_path, job())
    assert (done.made, done.found, done.seed, done.batch) == (COUNT, 0, 100, BATCH)
    assert list(pictures(tmp_path)) == [f"{index:05d}.png" for index in range(COUNT)]
    assert painter.drawn == [[100, 101], [102, 103], [104]]
    assert [(one["image"], one["seed"], one["batch"]) for one in entries(tmp_path)] == [
        (0, 100, [0, 1]),
        (1, 101, [0, 1]),
        (2, 102, [2, 3]),
        (3, 103, [2, 3]),
        (4, 104, [4]),
    ]
    assert {one.name for one in tmp_path.iterdir()} == {*pictures(tmp_path), MANIFEST, LOCK}


def test_what_is_done_is_not_done_again_and_nothing_is_loaded_for_it(tmp_path, painter):
    go(tmp_path, job())
    before = {one.name: one.stat().st_mtime_ns for one in tmp_path.iterdir()}
    done = go(tmp_path, job(seed=None))
    assert (done.made, done.found, done.seed) == (0, COUNT, 100)
    assert painter.attached == 1
    assert {one.name: one.stat().st_mtime_ns for one in tmp_path.iterdir()} == before


def test_a_picture_that_is_gone_is_made_again_in_the_same_company(tmp_path, painter):
    go(tmp_path, job())
    whole = pictures(tmp_path)
    (tmp_path / "00003.png").unlink()
    done = go(tmp_path, job())
    assert (done.made, done.found) == (1, COUNT - 1)
    assert painter.drawn[-1] == [102, 103]
    assert pictures(tmp_path) == whole


def _die_at(step: int, torn: bool) -> None:
    """Have this process end at its n-th write of any kind, as a kill would: nothing is cleaned up behind it."""
    steps = itertools.count()

    def watched(real: Callable[..., Any], is_sync: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(steps) == step:
                if is_sync and torn:  # the disk holds a part of what was written
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size * 2 // 3)
                os._exit(9)
            return real(*arguments)

        return call

    folder_module.os.fsync = watched(os.fsync, True)  # type: ignore[assignment]
    folder_module.os.replace = watched(os.replace, False)  # type: ignore[assignment]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_write_it_goes_on_and_ends_the_same(tmp_path, painter, torn):
    go(tmp_path / "whole", job(count=3))
    whole = pictures(tmp_path / "whole")
    points = 0
    for step in itertools.count():
        path = tmp_path / str(step)
        child = os.fork()
        if child == 0:
            _die_at(step, torn)
            go(path, job(count=3))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == 9
        points += 1
        there = pictures(path)
        assert there.items() <= whole.items(), "a picture that has its name is whole"
        painter.drawn.clear()
        done = go(path, job(count=3))
        assert done.found == len(there), "a picture that was there is not made again"
        assert pictures(path) == whole
        assert sorted(one["image"] for one in entries(path)) == [0, 1, 2]
        assert not list(path.glob(".part-*"))
    # A picture is synced and named; the heading as well; what each of two batches says is synced.
    assert points == 2 * 3 + 2 + 2


def test_out_of_memory_halves_a_batch_and_loses_nothing(tmp_path, painter):
    painter.room = 2
    done = go(tmp_path, job(count=8, batch=8))
    assert (done.made, done.batch) == (8, 8)
    assert [one["seed"] for one in entries(tmp_path)] == list(range(100, 108))
    assert max(len(one["batch"]) for one in entries(tmp_path)) == 2


def test_a_picture_that_never_fits_is_an_error_and_the_others_stay(tmp_path, painter):
    go(tmp_path, job())
    (tmp_path / "00004.png").unlink()
    painter.room = 0
    with pytest.raises(DoesNotFit, match=r"picture 4: .* \(no room\); give a smaller"):
        go(tmp_path, job())
    assert len(pictures(tmp_path)) == COUNT - 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (job(count=4), "prompts was"),
        (job(seed=5), "seed was 100, is 5"),
        (job(batch=3), "batch was 2, is 3"),
        (job(negative="blur"), "negative was None, is 'blur'"),
        (job(call={"num_inference_steps": 3}), "call was {}, is {'num_inference_steps': 3}"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_untouched(tmp_path, painter, other, words):
    go(tmp_path, job())
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    with pytest.raises(OtherRun, match="or another folder") as refused:
        go(tmp_path, other)
    assert words in str(refused.value)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_a_run_that_left_no_picture_may_be_begun_anew_with_something_else(tmp_path, painter):
    painter.before_draw = lambda: (_ for _ in ()).throw(KeyError("refused"))
    with pytest.raises(KeyError):
        go(tmp_path, job())
    painter.before_draw = lambda: None
    assert go(tmp_path, job(count=4, seed=5)).seed == 5
    assert len(pictures(tmp_path)) == 4


def test_the_seed_and_batch_that_were_chosen_are_those_of_the_run_that_goes_on(tmp_path, painter):
    first = go(tmp_path, job(seed=None))
    whole = pictures(tmp_path)
    (tmp_path / "00000.png").unlink()
    assert go(tmp_path, job(seed=None)).seed == first.seed
    assert go(tmp_path, job(seed=first.seed, batch=first.batch)).found == COUNT
    assert pictures(tmp_path) == whole


def test_seeds_of_the_file_are_taken(tmp_path, painter):
    prompts = (Prompt("a", seed=7), Prompt("b"))
    go(tmp_path, Job(Path("pipeline"), prompts, Settings("digest"), Limits(), 100, 1))
    assert painter.drawn == [[7], [101]]


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path, painter):
    pytest.importorskip("fcntl")
    with RunFolder.opened(tmp_path), pytest.raises(BadFolder, match="another process runs in it; wait"):
        go(tmp_path, job())
    assert go(tmp_path, job()).made == COUNT


def test_files_of_others_are_never_overwritten(tmp_path, painter):
    (tmp_path / "00002.png").write_bytes(b"mine")
    with pytest.raises(BadFolder, match="in the way"):
        go(tmp_path, job())
    assert (tmp_path / "00002.png").read_bytes() == b"mine"
    assert not (tmp_path / MANIFEST).exists()


def test_a_picture_that_was_changed_is_not_overwritten(tmp_path, painter):
    go(tmp_path, job())
    (tmp_path / "00002.png").write_bytes(b"edited")
    with pytest.raises(BadFolder, match="not as it was written; move it"):
        go(tmp_path, job())
    assert (tmp_path / "00002.png").read_bytes() == b"edited"


def test_a_picture_of_another_run_that_no_manifest_names_is_not_taken_for_ours(tmp_path, painter):
    go(tmp_path / "a", job(seed=1))
    go(tmp_path / "b", job(seed=2))
    lines = (tmp_path / "b" / MANIFEST).read_text().splitlines(keepends=True)
    (tmp_path / "b" / MANIFEST).write_text("".join(lines[:-1]))
    (tmp_path / "b" / "00004.png").write_bytes((tmp_path / "a" / "00004.png").read_bytes())
    with pytest.raises(BadFolder, match="no picture of this run"):
        go(tmp_path / "b", job(seed=2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{}\n" + text,
        lambda text: text.replace('"seed": 100', '"seed": 101', 1),
        lambda text: text.replace('"manifest": 1', '"manifest": 2'),
        lambda text: text + "no json\n",
        lambda text: text + '{"image": 99}\n',
        lambda text: text + '{"image": "../../x"}\n',
        lambda text: text + "[1]\n",
        lambda text: "\0" * 9 + "\n",
    ],
)
def test_a_manifest_that_was_damaged_is_an_error_of_ours(tmp_path, painter, damage):
    go(tmp_path, job())
    path = tmp_path / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(BadFolder, match="restore it, or give another folder"):
        go(tmp_path, job())


@pytest.mark.parametrize("fails_at", range(4))
def test_a_full_disk_is_one_line_and_what_is_done_stays(tmp_path, painter, monkeypatch, fails_at):
    real, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module.os, "fsync", full)
        with pytest.raises(BadFolder, match="No space left on device; make room and run the same again"):
            go(tmp_path, job())
    assert not list(tmp_path.glob(".part-*"))
    there = len(pictures(tmp_path))
    assert go(tmp_path, job()).found == there
    assert sorted(one["image"] for one in entries(tmp_path)) == list(range(COUNT))


def test_a_folder_that_cannot_be_made_or_written_to(tmp_path, painter, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a\0b"):
        with pytest.raises(BadFolder, match="give a folder that you may write to"):
            go(path, job())
    monkeypatch.setattr(
        folder_module.os, "open", lambda *arguments: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(BadFolder, match="Permission denied"):
        go(tmp_path, job())
