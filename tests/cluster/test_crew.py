"""Pictures by a crew of workers on a stand-in for Ray: each one once and as a single process makes it, whatever ends in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("fsspec")
pytest.importorskip("torch")

from fake_ray import FakeRay, ProcessEnds
from PIL import Image

from overflowml_core.cli.running import runner
from overflowml_core.cli.running.folder import BadFolder, OtherRun, RunFolder
from overflowml_core.cli.running.prompts import Prompt
from overflowml_core.cli.running.runner import Job, run_job
from overflowml_core.cli.running.settings import Settings
from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits
from overflowml_core.plan import Estimate
from overflowml_ray import crew, pictures
from overflowml_ray.errors import NobodyLeft, TaskFailed
from overflowml_ray.pictures import run_on_cluster
from overflowml_ray.storage import Storage, StorageRun

COUNT = 12


class Painter:
    """Stands for a pipeline at each worker."""

    def __init__(self) -> None:
        self.before_draw: Callable[[int], None] = lambda seed: None
        self.attaches = True

    def check(self, prompts: Any) -> None:
        pass

    def attach(self, *_: Any) -> Any:
        if not self.attaches:
            raise DoesNotFit("too large for this node")
        return SimpleNamespace(plan=SimpleNamespace(estimate=Estimate()))

    def draw(self, prompts: Any, seeds: Any) -> list[Any]:
        self.before_draw(seeds[0])
        return [Image.new("RGB", (4, 4), (seed % 256, len(seeds), seeds[0] % 256)) for seed in seeds]


@pytest.fixture
def painter(monkeypatch) -> Painter:
    ours = Painter()
    for module in (runner, pictures):
        monkeypatch.setattr(module, "open_pipeline", lambda *arguments: ours)
    return ours


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


def job(model: Path, batch: int | None = 2, seed: int | None = 100) -> Job:
    return Job(model, tuple(Prompt(f"picture {index}") for index in range(COUNT)), Settings("digest"), Limits(), seed, batch)


def by_cluster(ray: FakeRay, what: Job, out: Path) -> tuple[Any, Any, list[str]]:
    notes: list[str] = []
    with RunFolder.opened(out) as folder:
        return (*run_on_cluster(ray, what, folder, lambda *_: None, notes.append), notes)


def files(out: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(out.glob("*.png"))}


def listed(out: Path) -> list[int]:
    return sorted(json.loads(line)["image"] for line in (out / "manifest.jsonl").read_text().splitlines()[1:])


@pytest.fixture
def alone(tmp_path, painter, model) -> dict[str, bytes]:
    with RunFolder.opened(tmp_path / "alone") as folder:
        run_job(job(model), folder, lambda *_: None)
    return files(tmp_path / "alone")


def test_files_are_those_of_a_single_process_and_either_goes_on_with_the_other(fake_ray, tmp_path, painter, model, alone):
    done, summary, notes = by_cluster(fake_ray, job(model), tmp_path / "out")
    assert (done.made, done.found, notes) == (COUNT, 0, [])
    assert len(summary.tasks) == 3
    assert files(tmp_path / "out") == alone
    assert listed(tmp_path / "out") == list(range(COUNT))
    (tmp_path / "out" / "00003.png").unlink()
    with RunFolder.opened(tmp_path / "out") as folder:
        assert run_job(job(model), folder, lambda *_: None).made == 1
    (tmp_path / "alone" / "00004.png").unlink()
    assert by_cluster(fake_ray, job(model), tmp_path / "alone")[0].made == 1
    assert files(tmp_path / "out") == files(tmp_path / "alone") == alone
    assert all(actor.is_dead for actor in fake_ray.actors), "no process is left behind"


def test_a_process_that_ends_loses_nothing(fake_ray, tmp_path, painter, model, alone):
    ended = []

    def end_once(seed: int) -> None:
        if seed == 104 and not ended:
            ended.append(seed)
            raise ProcessEnds

    painter.before_draw = end_once
    _, summary, notes = by_cluster(fake_ray, job(model), tmp_path / "out")
    assert files(tmp_path / "out") == alone
    assert summary.counts.redone >= 1
    assert "its process ended (ActorDiedError" in notes[0]


def test_a_node_that_ends_is_named_and_loses_nothing(fake_ray, tmp_path, painter, model, alone):
    painter.before_draw = lambda seed: fake_ray.end_node("00000002") if seed >= 104 else None
    _, summary, _ = by_cluster(fake_ray, job(model), tmp_path / "out")
    assert files(tmp_path / "out") == alone
    assert summary.aside == {"host2 (00000002)": "its node is gone"}


def test_when_all_nodes_end_what_is_done_stays_and_the_next_run_goes_on(fake_ray, tmp_path, painter, model, alone):
    def end_all(seed: int) -> None:
        if seed >= 108:
            for node in fake_ray.nodes():
                fake_ray.end_node(node["NodeID"])

    painter.before_draw = end_all
    with pytest.raises(NobodyLeft, match=r"host0 \(00000000\): its node is gone"):
        by_cluster(fake_ray, job(model), tmp_path / "out")
    there = files(tmp_path / "out")
    assert 0 < len(there) < COUNT
    painter.before_draw = lambda seed: None
    done, _, _ = by_cluster(FakeRay(1), job(model, batch=None, seed=None), tmp_path / "out")
    assert done.found == len(there)
    assert files(tmp_path / "out") == alone


def test_a_fault_is_tried_elsewhere_and_twice_is_an_error_that_names_the_picture(fake_ray, tmp_path, painter, model, alone):
    faults = []

    def fail_once(seed: int) -> None:
        if seed == 102 and not faults:
            faults.append(seed)
            raise RuntimeError("CUDA error: the device is gone")

    painter.before_draw = fail_once
    _, _, notes = by_cluster(fake_ray, job(model), tmp_path / "out")
    assert files(tmp_path / "out") == alone
    assert "RuntimeError: CUDA error: the device is gone; another process takes its place" in notes[0]

    def fail(seed: int) -> None:
        if seed == 102:
            raise RuntimeError("broken")

    painter.before_draw = fail
    with pytest.raises(TaskFailed, match="picture 2: it failed 2 times"):
        by_cluster(fake_ray, job(model), tmp_path / "other")


def test_nodes_that_cannot_hold_the_model_are_named(fake_ray, tmp_path, painter, model):
    painter.attaches = False
    with pytest.raises(NobodyLeft, match=r"no worker is left for 6 tasks \(.*host0 \(00000000\): too large for this node"):
        by_cluster(fake_ray, job(model), tmp_path / "out")


def test_a_node_with_other_versions_gets_nothing(fake_ray, tmp_path, painter, model, alone, monkeypatch):
    real, asked = crew.question, []

    def question() -> Callable[[], dict[str, str]]:
        asked.append(True)
        return (lambda: {"python": "2.7"}) if len(asked) == 2 else real()

    monkeypatch.setattr(crew, "question", question)
    _, summary, notes = by_cluster(fake_ray, job(model), tmp_path / "out")
    assert files(tmp_path / "out") == alone
    assert list(summary.aside) == ["host1 (00000001)"]
    assert "host1 (00000001) is set aside: python is 2.7 there" in notes[0]
    assert "host1 (00000001)" not in summary.tasks


def test_a_storage_holds_the_same_files(fake_ray, tmp_path, painter, model, alone):
    run = StorageRun(Storage(f"file://{tmp_path}/store"))
    run_on_cluster(fake_ray, job(model), run, lambda *_: None, lambda words: None)
    assert files(tmp_path / "store") == alone
    assert listed(tmp_path / "store") == list(range(COUNT))
    (tmp_path / "store" / "00005.png").unlink()
    again = StorageRun(Storage(f"file://{tmp_path}/store"))
    done, _ = run_on_cluster(fake_ray, job(model), again, lambda *_: None, lambda words: None)
    assert (done.made, done.found) == (1, COUNT - 1)
    assert files(tmp_path / "store") == alone


def test_a_node_that_cannot_write_to_the_storage_is_named_and_others_do_its_work(fake_ray, tmp_path, painter, model, alone, monkeypatch):
    real, full = Storage.put_new, []

    def put_new(self: Storage, name: str, content: bytes) -> bytes:
        if not full:
            full.append(name)
            raise OSError(28, "No space left on device")
        return real(self, name, content)

    monkeypatch.setattr(Storage, "put_new", put_new)
    run = StorageRun(Storage(f"file://{tmp_path}/store"))
    _, summary = run_on_cluster(fake_ray, job(model), run, lambda *_: None, lambda words: None)
    assert files(tmp_path / "store") == alone
    assert len(summary.aside) == 1
    assert "cannot be written from there (No space left on device)" in next(iter(summary.aside.values()))


def test_a_full_disk_of_the_driver_ends_the_run_and_leaves_no_process(fake_ray, tmp_path, painter, model, monkeypatch):
    def full(*arguments: Any) -> None:
        raise BadFolder(tmp_path, "No space left on device", "make room")

    monkeypatch.setattr(RunFolder, "keep", full)
    with pytest.raises(BadFolder, match="No space"):
        by_cluster(fake_ray, job(model), tmp_path / "out")
    assert fake_ray.actors
    assert all(actor.is_dead for actor in fake_ray.actors)


def test_another_run_is_refused(fake_ray, tmp_path, painter, model):
    by_cluster(fake_ray, job(model), tmp_path / "out")
    with pytest.raises(OtherRun, match="seed was 100, is 5"):
        by_cluster(fake_ray, job(model, seed=5), tmp_path / "out")


def test_a_cluster_without_processors_is_an_error(fake_ray, tmp_path, painter, model):
    fake_ray.node_list = [{**node, "Resources": {}} for node in fake_ray.node_list]
    with pytest.raises(NobodyLeft, match="no node with a processor to spare"):
        by_cluster(fake_ray, job(model), tmp_path / "out")
