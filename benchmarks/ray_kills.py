"""Kills a node and the driver of ``overflowml run --ray`` in the middle, goes on, and holds the pictures against a single process.

    pip install "ray==2.*"
    python benchmarks/ray_kills.py --json benchmarks/results/ray_kills.json

A real cluster of three nodes on this machine (``ray.cluster_utils.Cluster``), each with one core for Ray; the pipeline is that of
``run_kills.py``. A node is killed after a quarter of the pictures, the driver after half of them. Seconds of a picture are counted from
the first to the last one, so that loading is left out; the overhead of a task is that of a function that does nothing, by one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_model import write_pipeline

ROOT = Path(__file__).resolve().parents[1]
_LONGEST_S = 900.0
_GONE = "its node is gone"
_QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A node that is killed is believed to be gone after a second; by Ray's own settings after ten to twenty."""


def main() -> None:
    """Run it, print what happened, and end with status 1 where a picture is missing, different or was made twice."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--pictures", type=int, default=60)
    asked.add_argument("--steps", type=int, default=30)
    asked.add_argument("--tasks", type=int, default=500, help="that do nothing, for the overhead")
    asked.add_argument("--quick", action="store_true", help="no rates of whole runs")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = killed(Path(folder), given.pictures, given.steps)
        _write(result, given.json)  # what is measured next takes minutes
        result |= overhead(Path(folder), given.tasks)
        _write(result, given.json)
        if not given.quick:
            result |= rates(Path(folder), given.pictures, given.steps, result["single_process_picture_s"])
    _write(result, given.json)
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ok"] and result.get("whole_runs_identical", True) else 1)


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def killed(folder: Path, pictures: int, steps: int) -> dict[str, Any]:
    """A single process, then a cluster that loses a node and its driver.

    Args:
        folder: for everything that is written.
        pictures: of each run.
        steps: of each picture.
    """
    for name, value in _environment(folder).items():
        os.environ[name] = value  # the nodes' processes take it from here
    write_pipeline(folder / "pipeline", width=24)
    (folder / "prompts.txt").write_text("".join(f"picture number {index} of a landscape\n" for index in range(pictures)))
    command = _command(folder, steps)
    alone = folder / "alone"
    alone_s = _picture_s(_start([*command, str(alone)], folder), alone, pictures, folder)
    expected = _pictures(alone)

    out, faults = folder / "cluster", []
    with _cluster(folder, 3) as (cluster, nodes):
        killing = [*command, str(out), "--ray", cluster.address, "--json"]
        process = _start(killing, folder)
        _wait_for(process, out, pictures // 4, folder)
        cluster.remove_node(nodes[-1], allow_graceful=False)
        _wait_for(process, out, pictures // 2, folder, until=_GONE)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = _pictures(out)
        said = (folder / "log").read_text(errors="replace")
        last = _finish(_start(killing, folder), folder)
    there = _pictures(out)
    faults += [f"{name}: changed or made twice" for name, picture in before.items() if there.get(name) != picture]
    same = sum(there.get(name, ("", 0))[0] == digest for name, (digest, _) in expected.items())
    listed = [json.loads(line)["image"] for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]
    if sorted(listed) != list(range(pictures)):
        faults.append(f"the manifest lists {sorted(listed)}")
    if _GONE not in said:
        faults.append("the driver did not name the node that was killed")

    return {
        "ok": not faults and same == pictures == len(there),
        "pictures": pictures,
        "identical": same,
        "listed_once": sorted(listed) == list(range(pictures)),
        "there_when_the_driver_was_killed": len(before),
        "found_by_the_next_driver": last["found"],
        "made_by_the_next_driver": last["made"],
        "workers_of_the_next_driver": len(last["workers"]),
        "single_process_picture_s": round(alone_s, 4),
        "faults": faults,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }


def rates(folder: Path, pictures: int, steps: int, alone_s: float) -> dict[str, Any]:
    """Seconds of a picture by one worker and by three, beside those of a single process; what they make is the same, too."""
    command, expected = _command(folder, steps), {name: digest for name, (digest, _) in _pictures(folder / "alone").items()}
    picture_s, same = {}, True
    for count in (1, 3):
        with _cluster(folder, count) as (cluster, _):
            out = folder / f"whole{count}"
            picture_s[count] = _picture_s(_start([*command, str(out), "--ray", cluster.address], folder), out, pictures, folder)
            same &= {name: digest for name, (digest, _) in _pictures(out).items()} == expected
    return {
        "whole_runs_identical": same,
        "one_worker_picture_s": round(picture_s[1], 4),
        "three_workers_picture_s": round(picture_s[3], 4),
        "throughput_of_three_over_one_worker": round(picture_s[1] / picture_s[3], 3),
        "throughput_of_one_worker_over_a_single_process": round(alone_s / picture_s[1], 3),
    }


def _command(folder: Path, steps: int) -> list[str]:
    command = [sys.executable, "-m", "overflowml", "run", str(folder / "pipeline"), "--prompts", str(folder / "prompts.txt")]
    return [*command, "--seed", "7", "--steps", str(steps), "--batch", "1", "--out"]


def overhead(folder: Path, tasks: int) -> dict[str, Any]:
    """Milliseconds of a task that does nothing, by one worker and by three."""
    import ray

    import overflowml.ray

    found: dict[str, Any] = {}
    for count in (1, 3):
        with _cluster(folder, count) as (cluster, _):
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            try:
                moments: list[float] = []
                overflowml.ray.map(abs, range(tasks), tell=lambda done, total, moments=moments: moments.append(time.perf_counter()))
            finally:
                ray.shutdown()
            found[f"overhead_ms_of_a_task_{count}_workers"] = round((moments[-1] - moments[0]) / (tasks - 1) * 1e3, 3)
    return found


@contextlib.contextmanager
def _cluster(folder: Path, count: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of so many nodes with one core each; nothing of it is left behind."""
    from ray.cluster_utils import Cluster

    for name, value in _environment(folder).items():
        os.environ[name] = value
    cluster, how = Cluster(), {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    try:
        nodes = [cluster.add_node(**how, **({} if index else {"_system_config": _QUICK})) for index in range(count)]
        yield cluster, nodes
    finally:
        cluster.shutdown()


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO,STRICT",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OVERFLOWML_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep))),
    }


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log, (folder / "output").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=log, env={**os.environ, **_environment(folder)}, cwd=folder)


def _finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    if process.wait(timeout=_LONGEST_S):
        raise SystemExit(f"a run failed: {(folder / 'log').read_text(errors='replace')[-3000:]}")
    text = (folder / "output").read_text()
    found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
    return found


def _wait_for(process: subprocess.Popen[bytes], out: Path, count: int, folder: Path, until: str = "") -> None:
    """Until so many pictures are there, and the run has said something, unless nine tenths as many again are there before it does."""
    start_s = time.monotonic()
    while (there := len(list(out.glob("[0-9]*.png")))) < count or (
        until and there < 1.9 * count and until not in (folder / "log").read_text(errors="replace")
    ):
        if process.poll() is not None or time.monotonic() - start_s > _LONGEST_S:
            process.kill()
            raise SystemExit(f"a run ended or hung: {(folder / 'log').read_text(errors='replace')[-3000:]}")
        time.sleep(0.005)


def _picture_s(process: subprocess.Popen[bytes], out: Path, pictures: int, folder: Path) -> float:
    """Seconds of a picture, from the first to the last one."""
    _wait_for(process, out, 1, folder)
    start_s = time.perf_counter()
    first = len(list(out.glob("[0-9]*.png")))
    _wait_for(process, out, pictures, folder)
    taken_s = time.perf_counter() - start_s
    _finish(process, folder)
    return taken_s / max(1, pictures - first)


def _pictures(out: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of the last change of each picture that has its name."""
    return {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in out.glob("[0-9]*.png")}


if __name__ == "__main__":
    main()
