"""The load part: memory and seconds of loading a model under a budget, in fresh processes, beside accelerate's load and the plain one."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import Report
from stream_disk import IMPORTS, Settings
from stream_model import weight_files
from stream_system import anonymous_bytes_of, drop_cache, read_bytes_of
from stream_worker import SideFailed, Worker

SIDES = ("ours", "accelerate", "mmap")
_SAMPLE_S = 0.005


@dataclass(frozen=True)
class Load:
    """One load in a fresh process.

    Attributes:
        before_bytes: anonymous memory with everything imported.
        peak_bytes: most of it during the load.
        pass_peak_bytes: most of it during load and first pass.
        load_s, first_pass_s: of the load, and of the first pass behind it, which pays for what a load leaves to it.
        read_bytes: that the disk read during both.
        told: what the side says of itself.
    """

    before_bytes: int
    peak_bytes: int
    pass_peak_bytes: int
    load_s: float
    first_pass_s: float
    read_bytes: int
    told: dict[str, Any]


class Sampler(threading.Thread):
    """Looks at a process's anonymous memory every five milliseconds, from outside, so that it takes no time of its."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._ended = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes_of(self._pid) or 0)

    def end(self) -> None:
        """No more looking."""
        self._ended.set()
        self.join()


def measure(settings: Settings, report: Report, notes: list[str], rounds: int = 3) -> list[dict[str, Any]]:
    """Load a few times on each side, in turn, and add the figures. Returns a row for each side."""
    loads: dict[str, list[Load]] = {name: [] for name in SIDES}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in SIDES if number % 2 == 0 else SIDES[::-1]:
            if name in failed:
                continue
            try:
                loads[name].append(_load(name, settings))
            except (SideFailed, OSError) as error:
                failed[name] = str(error)
                notes.append(f"load, {name}: {error}")
                print(f"load, {name}: {error}", file=sys.stderr, flush=True)
    for name, found in loads.items():
        if found:
            report.add(f"load.{name}.seconds", statistics.median(load.load_s for load in found), "s")
            report.add(f"load.{name}.first_pass_s", statistics.median(load.first_pass_s for load in found), "s")
            report.add(f"load.{name}.rate", statistics.median(_rate(load) for load in found), "bytes/s of load and first pass")
            report.add(f"load.{name}.peak_bytes", statistics.median(load.peak_bytes for load in found), "anonymous bytes")
    if loads["ours"]:
        report.add("load.before_bytes", statistics.median(load.before_bytes for load in loads["ours"]), "anonymous bytes of the imports")
        report.add("load.block_bytes", loads["ours"][0].told["block_bytes"], "bytes")
        # The worst of the loads: a promise about memory is one about the peak.
        report.add("load.extra_bytes", max(extra_bytes(load) for load in loads["ours"]), "bytes over imports, budget and one block")
        with_imports = max(extra_bytes(load) + load.before_bytes for load in loads["ours"])
        report.add("load.extra_with_imports_bytes", with_imports, "bytes over budget and one block")
    return [_row(name, found, failed.get(name, "")) for name, found in loads.items()]


def extra_bytes(load: Load) -> int:
    """What a load took beyond what was there before, the budget and one block; negative where it stays below."""
    return load.peak_bytes - load.before_bytes - load.told["budget_bytes"] - load.told["block_bytes"]


def _rate(load: Load) -> float:
    return load.read_bytes / (load.load_s + load.first_pass_s)


def _load(name: str, settings: Settings) -> Load:
    files = weight_files(settings.model)
    drop_cache(files)
    worker = Worker(name, settings.work / f"load-{name}.log")
    try:
        worker.ready([*IMPORTS[name], *_model_code(settings.model)], settings.threads)
        time.sleep(0.2)  # threads of the imports come to rest
        before_bytes = anonymous_bytes_of(worker.pid)
        if before_bytes is None:
            raise SideFailed("this system does not tell a process's anonymous memory")
        read_before = read_bytes_of(worker.pid) or 0
        sampler = Sampler(worker.pid)
        sampler.start()
        try:
            loaded = worker.load(name, settings.model, settings.work / f"load-scratch-{name}", settings.budget_bytes)
            peak_bytes = max(sampler.peak_bytes, anonymous_bytes_of(worker.pid) or 0)
            done = worker.passes(1)
        finally:
            sampler.end()
        read_bytes = (read_bytes_of(worker.pid) or 0) - read_before
    finally:
        worker.close()
    return Load(
        before_bytes=before_bytes,
        peak_bytes=peak_bytes,
        pass_peak_bytes=max(peak_bytes, sampler.peak_bytes),
        load_s=loaded["seconds"],
        first_pass_s=done["seconds"][0],
        read_bytes=read_bytes,
        told=loaded["told"],
    )


def _model_code(model: Path) -> list[str]:
    """The module of transformers that holds a model's class, where there is one by that name: its import is no part of a load."""
    kind = json.loads((model / "config.json").read_text("utf-8")).get("model_type", "")
    name = f"transformers.models.{kind}.modeling_{kind}"
    try:
        return [name] if find_spec(name) is not None else []
    except ModuleNotFoundError:
        return []


def _row(name: str, loads: list[Load], error: str) -> dict[str, Any]:
    if not loads:
        return {"side": name, "error": error or "no load"}
    return {
        "side": name,
        "load_s": statistics.median(load.load_s for load in loads),
        "first_pass_s": statistics.median(load.first_pass_s for load in loads),
        "read_bytes": statistics.median(load.read_bytes for load in loads),
        "before_bytes": statistics.median(load.before_bytes for load in loads),
        "peak_bytes": max(load.peak_bytes for load in loads),
        "pass_peak_bytes": max(load.pass_peak_bytes for load in loads),
        "error": error,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| side | load | first pass | read by both | anonymous memory before | most while loading | most, first pass included | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "load_s" not in row:
            lines.append(f"| {row['side']} | | | | | | | {row['error']} |")
            continue
        sizes = [f"{row[key] / 1e6:.0f} MB" for key in ("read_bytes", "before_bytes", "peak_bytes", "pass_peak_bytes")]
        cells = [row["side"], f"{row['load_s']:.2f} s", f"{row['first_pass_s']:.2f} s", *sizes, row["error"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
