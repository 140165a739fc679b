"""Kills ``overflowml run`` at random moments and goes on, until all pictures are there; then holds them against an undisturbed run.

    python benchmarks/run_kills.py --kills 10 --pictures 30 --json benchmarks/results/run_kills.json

The pipeline is of Stable Diffusion's own classes with random weights, under a budget that streams its UNet. A kill falls into loading, at a
moment that is drawn evenly from the time it takes, or into drawing: up to half a second after a number of pictures that is drawn as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from run_model import write_pipeline

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Kill:
    """One kill: seconds after the start, pictures that were there before and after, and whether the process had ended by itself."""

    after_s: float
    before: int
    there: int
    had_ended: bool


def main() -> None:
    """Run it, print what happened, and end with status 1 where a picture is missing, different or was made twice."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--kills", type=int, default=10)
    asked.add_argument("--pictures", type=int, default=30)
    asked.add_argument("--batch", default="2")
    asked.add_argument("--steps", type=int, default=30)
    asked.add_argument("--budget", default="3500KB")
    asked.add_argument("--seed", type=int, default=1, help="of the moments")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given)
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if result["ok"] else 1)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """An undisturbed run, then one that is killed again and again."""
    write_pipeline(folder / "pipeline", width=24)
    (folder / "prompts.txt").write_text("".join(f"picture number {index} of a landscape\n" for index in range(given.pictures)))
    command = [sys.executable, "-m", "overflowml", "run", str(folder / "pipeline"), "--prompts", str(folder / "prompts.txt")]
    command += ["--seed", "7", "--steps", str(given.steps), "--batch", given.batch, "--budget", given.budget, "--out"]

    _finish(_start([*command, str(folder / "warm")], folder), folder)  # the profile is kept, and loading takes as long each time
    whole = folder / "whole"
    start_s = time.perf_counter()
    process = _start([*command, str(whole)], folder)
    while not _pictures(whole):
        if process.poll() is not None:
            _finish(process, folder)
        time.sleep(0.02)
    load_s = time.perf_counter() - start_s
    _finish(process, folder)
    draw_s = time.perf_counter() - start_s - load_s
    expected = _pictures(whole)

    out, dice = folder / "killed", random.Random(given.seed)
    kills: list[Kill] = []
    faults: list[str] = []
    while sum(not kill.had_ended for kill in kills) < given.kills and len(kills) < 4 * given.kills:
        before = _pictures(out)
        process = _start([*command, str(out)], folder)
        start_s = time.perf_counter()
        left = max(1, given.kills - len(kills))
        more = dice.randint(1, max(1, (given.pictures - len(before)) // left))
        while_loading_s = dice.uniform(0, load_s) if dice.random() < 0.4 else float("inf")
        while process.poll() is None and len(_pictures(out)) < len(before) + more and time.perf_counter() - start_s < while_loading_s:
            time.sleep(0.01)
        if while_loading_s == float("inf"):
            time.sleep(dice.uniform(0, 0.5))
        after_s = time.perf_counter() - start_s
        had_ended = process.poll() is not None
        if not had_ended:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        there = _pictures(out)
        kills.append(Kill(round(after_s, 3), len(before), len(there), had_ended))
        print(f"killed after {after_s:.2f} s: {len(before)} -> {len(there)} pictures{' (it had ended)' if had_ended else ''}", flush=True)
        faults += [f"{name}: changed or made twice" for name, picture in before.items() if there.get(name) != picture]
        faults += [f"{name}: differs" for name, (digest, _) in there.items() if expected[name][0] != digest]
    process = _start([*command, str(out)], folder)
    if process.wait():
        faults.append(f"the last run failed: {(folder / 'log').read_text()[-2000:]}")
    there = _pictures(out)
    listed = [json.loads(line)["image"] for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]
    same = sum(there.get(name, ("", 0))[0] == digest for name, (digest, _) in expected.items())
    faults += [] if sorted(listed) == list(range(given.pictures)) else [f"the manifest lists {sorted(listed)}"]
    return {
        "ok": not faults and same == given.pictures == len(there),
        "pictures": given.pictures,
        "identical": same,
        "listed_once": sorted(listed) == list(range(given.pictures)),
        "kills_while_running": sum(not kill.had_ended for kill in kills),
        "kills_that_found_pictures_under_way": sum(0 < kill.there < given.pictures for kill in kills),
        "load_s": round(load_s, 2),
        "draw_s": round(draw_s, 2),
        "batch": given.batch,
        "budget": given.budget,
        "faults": faults,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "kills": [asdict(kill) for kill in kills],
    }


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        raise SystemExit(f"an undisturbed run failed: {(folder / 'log').read_text()[-2000:]}")


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO,STRICT",
        **os.environ,
        "OVERFLOWML_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)


def _pictures(out: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of the last change of each picture that has its name."""
    return {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in out.glob("[0-9]*.png")}


if __name__ == "__main__":
    main()
