"""A real Ray cluster on this machine: functions over items, workers and nodes that end, and pictures that are there once. Needs Ray."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install 'overflowml[ray]')")

import ray

import overflowml.ray
from overflowml_ray import crew as crew_module
from overflowml_ray.connection import connected
from overflowml_ray.crew import Crew, Summary
from overflowml_ray.errors import NobodyLeft, NoCluster, SetAside, TaskFailed, WorkRefused
from overflowml_ray.nodes import Seat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster()
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not find a test's module by its name
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@dataclass
class Doing:
    """Work whose tasks are a function of the seat and the task."""

    function: Callable[[Seat, Any], Any]

    def open(self, seat: Seat) -> Any:
        doing = self

        class Opened:
            def do(self, task: Any) -> Any:
                return doing.function(seat, task)

        return Opened()

    def unit_s(self) -> float | None:
        return None


def run(function: Callable[[Seat, Any], Any], count: int) -> tuple[dict[int, Any], Summary, list[str]]:
    found: dict[int, Any] = {}
    notes: list[str] = []

    def keep(task: int, value: Any) -> None:
        assert task not in found, "kept twice"
        found[task] = value

    with connected("auto") as module:
        summary = Crew(module, Doing(function), range(count), lambda task: f"item {task}", notes.append).run([1.0] * count, keep)
    return found, summary, notes


def test_results_come_in_the_order_of_the_items_and_every_node_works(cluster):
    def square(item: int) -> int:
        time.sleep(0.05)
        return item * item

    assert overflowml.ray.map(square, range(40)) == [item * item for item in range(40)]
    found, summary, notes = run(lambda seat, task: time.sleep(0.05), 40)
    assert len(found) == 40
    assert len(summary.tasks) == 2
    assert sum(summary.tasks.values()) == 40
    assert 80 <= summary.counts.messages <= 86
    assert notes == []


def test_what_is_loaded_is_loaded_once_in_each_worker(cluster, tmp_path):
    def load() -> str:
        (tmp_path / f"{os.getpid()}").touch(exist_ok=False)
        return "loaded"

    assert overflowml.ray.map(lambda loaded, item: (loaded, item), range(9), load=load) == [("loaded", item) for item in range(9)]
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def test_a_process_that_ends_loses_nothing(cluster, tmp_path):
    def end_once(seat: Seat, task: int) -> int:
        time.sleep(0.02)
        if task == 5:
            try:
                (tmp_path / "ended").touch(exist_ok=False)
            except FileExistsError:
                return task
            os._exit(1)
        return task

    found, summary, notes = run(end_once, 30)
    assert found == {task: task for task in range(30)}
    assert 1 <= summary.counts.redone <= 2
    assert len(notes) == 1
    assert "its process ended" in notes[0]
    assert summary.aside == {}


def test_a_fault_is_tried_by_another_process_and_twice_is_an_error(cluster, tmp_path):
    def fail_once(seat: Seat, task: int) -> int:
        if task == 3 and not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            raise RuntimeError("CUDA error: device-side assert triggered")
        return task

    found, _, notes = run(fail_once, 12)
    assert found == {task: task for task in range(12)}
    assert "RuntimeError: CUDA error" in notes[0]

    def fail(seat: Seat, task: int) -> int:
        return 1 // (task - 3)

    with pytest.raises(TaskFailed, match=r"item 3: it failed 2 times: ZeroDivisionError: .* then ZeroDivisionError"):
        run(fail, 12)


def test_a_task_that_ends_its_workers_is_an_error_and_not_the_end_of_all(cluster):
    def end(seat: Seat, task: int) -> None:
        if task == 2:
            os._exit(1)

    with pytest.raises(TaskFailed, match="item 2: 3 workers ended while they computed it"):
        run(end, 6)


def test_a_node_that_cannot_go_on_is_named_and_the_other_does_its_work(cluster):
    bad = ray.nodes()[1]["NodeID"]

    def full(seat: Seat, task: int) -> int:
        time.sleep(0.05)
        if seat.node == bad:
            raise SetAside("file:///out cannot be written from there (No space left on device)", whole_node=True)
        return task

    found, summary, notes = run(full, 12)
    assert found == {task: task for task in range(12)}
    assert list(summary.aside.values()) == ["file:///out cannot be written from there (No space left on device)"]
    assert bad[:8] in notes[0]

    def all_full(seat: Seat, task: int) -> int:
        raise SetAside("full")

    with pytest.raises(NobodyLeft, match=r"no worker is left for 6 tasks \(.*: full; .*: full\)"):
        run(all_full, 6)


def test_work_that_is_wrong_ends_at_once(cluster):
    def refuse(seat: Seat, task: int) -> None:
        raise WorkRefused("no such argument")

    with pytest.raises(WorkRefused, match="no such argument"):
        run(refuse, 6)


def test_a_node_with_another_version_is_named_and_gets_nothing(cluster, monkeypatch):
    monkeypatch.setattr(crew_module, "versions_here", lambda: {"overflowml": "9.9"})
    with pytest.raises(NobodyLeft, match=r"overflowml is .* there and 9\.9 here"):
        run(lambda seat, task: task, 3)


def test_a_node_that_is_killed_loses_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(crew_module, "_LOOK_S", 0.5)
    late = cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
    ours = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != late.node_id]
    found: dict[int, Any] = {}
    killed: list[str] = []

    def slow(seat: Seat, task: int) -> str:
        # The others wait for the late one, which waits for its end: nobody has to be quick.
        mark = tmp_path / "late"
        if seat.node == late_id:
            mark.touch()
            time.sleep(600)
        while not mark.exists():
            time.sleep(0.02)
        return seat.node

    late_id = late.node_id

    def look(real: Callable[[Any], None]) -> Callable[[Any], None]:
        def looking(crew: Any) -> None:
            real(crew)
            if (tmp_path / "late").exists() and not killed:
                cluster.remove_node(late, allow_graceful=False)
                killed.append(late_id)

        return looking

    monkeypatch.setattr(Crew, "_look", look(Crew._look))
    notes: list[str] = []

    def keep(task: int, value: Any) -> None:
        assert task not in found
        found[task] = value

    summary = Crew(ray, Doing(slow), range(30), lambda task: f"item {task}", notes.append).run([1.0] * 30, keep)
    assert sorted(found) == list(range(30))
    assert set(found.values()) <= set(ours)
    assert killed
    assert summary.counts.redone + summary.counts.copies >= 1
    assert list(summary.aside.values()) in (["its node is gone"], []), "it may end before anybody looks"


def test_nothing_answers(cluster):
    with pytest.raises(NoCluster, match="nothing answers there"):
        overflowml.ray.map(abs, [1], "127.0.0.1:9")


def test_pictures_with_a_node_and_the_driver_killed(tmp_path):
    """See the benchmark, which does it with sixty and measures."""
    pytest.importorskip("diffusers")
    ray_kills = pytest.importorskip("ray_kills")
    result = ray_kills.killed(tmp_path, pictures=20, steps=8)
    assert result["faults"] == []
    assert result["identical"] == 20
    assert result["ok"]
