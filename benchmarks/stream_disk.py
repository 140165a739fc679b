"""The disk part: one-token passes of a model that is larger than its memory limit, each side in a process and a control group of its own.

The sides take turns. A turn is one pass that is not timed, so that what a side fetched ahead or what its cache kept in the pause counts for
nothing, and then passes one behind the other. Between turns the direct read rate of the same files is measured.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import Report
from stream_model import weight_files
from stream_rate import read_rate
from stream_system import Cage, available_bytes, drop_cache, make_cage
from stream_worker import SideFailed, Worker

CAGED = ("ours", "accelerate", "mmap", "airllm")
COPIED = ("accelerate", "mmap")
"""These read through the page cache: one's pages would serve the other, were their files the same."""
TURN_PASSES = 2
SETTLING_PASSES = {"ours": 10}
"""Passes before the first turn, for a side that changes its mind at first: overflowml tries close plans on real passes."""
IN_FLIGHT = 4


@dataclass(frozen=True)
class Settings:
    """What is measured, and where.

    Attributes:
        model: a folder with safetensors.
        work: for copies, logs and offloaded weights.
        budget_bytes: what each side is told it may use for weights.
        allowance_bytes: what a process may take beyond it, for the interpreter and its libraries.
        passes: timed passes of each side.
        airllm: an interpreter that has AirLLM, None to leave it out.
        sides: names of the sides.
        threads: that torch computes with; 0 leaves it to torch.
    """

    model: Path
    work: Path
    budget_bytes: int
    allowance_bytes: int
    passes: int
    airllm: str | None = None
    sides: tuple[str, ...] = (*CAGED, "resident")
    threads: int = 0

    @property
    def limit_bytes(self) -> int:
        """Memory limit of a side, pages of files included."""
        return self.budget_bytes + self.allowance_bytes

    def python(self, side: str) -> str:
        """The interpreter of a side."""
        return self.airllm if side == "airllm" and self.airllm else sys.executable


@dataclass
class Result:
    """What one side showed.

    Attributes:
        seconds: of each timed pass.
        read_bytes: that the disk read for each of them.
        told: what the side says of itself after the last.
        load_s: of its load.
        cage_peak_bytes: most memory of its group, where it had one.
        logits: a file with the last pass's, None until there was one.
        error: why there is no more; empty where nothing failed.
    """

    seconds: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    load_s: float = 0.0
    cage_peak_bytes: int | None = None
    logits: Path | None = None
    error: str = ""

    @property
    def pass_s(self) -> float:
        """Median of the passes."""
        return statistics.median(self.seconds)


class Contest:
    """The sides at work; leaving it ends their processes and takes their groups away."""

    def __init__(self, settings: Settings, notes: list[str]) -> None:
        self._settings = settings
        self._notes = notes
        self._files = weight_files(settings.model)
        self._workers: dict[str, Worker] = {}
        self._cages: dict[str, Cage] = {}
        self._dropping = False
        self.results: dict[str, Result] = {}
        self.rates: dict[int, list[float]] = {1: [], IN_FLIGHT: []}

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        for name, cage in self._cages.items():
            try:
                cage.remove()
            except OSError as error:
                self._notes.append(f"the control group of {name} could not be taken away: {error}")

    def run(self) -> None:
        """Load all sides, then let them take turns."""
        self._isolate()
        for name in self._settings.sides:
            self._try(name, self._start)
        for turn in range(-(-self._settings.passes // TURN_PASSES)):
            for in_flight, found in self.rates.items():
                found.append(read_rate(self._files, in_flight))
            names = self._settings.sides if turn % 2 == 0 else self._settings.sides[::-1]
            for name in names:
                self._try(name, self._turn)

    def _isolate(self) -> None:
        """Find out how the page cache can be kept from helping one side, and make ready for it."""
        settings = self._settings
        for name in settings.sides:
            cage = make_cage(f"overflowml-{name}-{os.getpid()}", settings.limit_bytes) if name in CAGED else None
            if cage is not None:
                self._cages[name] = cage
        caged = all(name in self._cages for name in settings.sides if name in CAGED)
        copied = [name for name in settings.sides if name in COPIED]
        needed_bytes = len(copied) * sum(file.stat().st_size for file in self._files)
        room = shutil.disk_usage(settings.work).free > needed_bytes * 1.1
        self._dropping = not (caged and room)
        if caged:
            version = next(iter(self._cages.values())).version if self._cages else 0
            self._notes.append(
                f"memory limit of {settings.limit_bytes} bytes for each side but resident, by control groups of version {version}"
            )
        else:
            self._notes.append("no control group can be made here: no side has a memory limit")
        if self._dropping:
            self._notes.append("before each turn all sides let go of their mapped pages, and the page cache is dropped")
        else:
            self._notes.append(
                f"{' and '.join(copied) or 'no side'}: a copy of the files of its own, so that no side's page cache helps another"
            )
            for name in copied:
                self._copy(self._model_of(name))

    def _model_of(self, name: str) -> Path:
        return self._settings.work / f"model-{name}" if name in COPIED and not self._dropping else self._settings.model

    def _copy(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for file in self._settings.model.iterdir():
            if file.is_file():
                shutil.copyfile(file, target / file.name)
        drop_cache([*weight_files(target), *self._files])

    def _try(self, name: str, step: Any) -> None:
        """Let a side do something; one that failed before is left out, one that fails now is out from now on."""
        result = self.results.setdefault(name, Result())
        if result.error:
            return
        try:
            step(name, result)
        except (SideFailed, OSError) as error:
            result.error = str(error)
            self._notes.append(f"{name}: {error}")
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            if name in self._workers:
                self._workers[name].close()

    def _start(self, name: str, result: Result) -> None:
        settings = self._settings
        if name == "airllm":
            if settings.airllm is None:
                raise SideFailed("left out: give --airllm an interpreter that has it")
            self._prepare(name)
        if name == "resident":
            needed_bytes = sum(file.stat().st_size for file in self._files) * 5 // 4
            if (available_bytes() or needed_bytes) < needed_bytes:
                raise SideFailed(f"left out: {needed_bytes} bytes of RAM are not available")
        worker = Worker(name, settings.work / f"{name}.log", settings.python(name), self._cages.get(name))
        self._workers[name] = worker
        worker.ready(IMPORTS[name], settings.threads)
        result.load_s = worker.load(name, self._model_of(name), settings.work / f"scratch-{name}", settings.budget_bytes)["seconds"]
        worker.passes(SETTLING_PASSES.get(name, 1))
        if name == "resident":
            worker.forget(self._files)
            drop_cache(self._files)

    def _prepare(self, name: str) -> None:
        """What a side makes on the disk once, before it is timed and without the limit."""
        settings = self._settings
        worker = Worker(name, settings.work / f"{name}-prepare.log", settings.python(name))
        try:
            worker.ready(IMPORTS[name])
            worker.load(name, self._model_of(name), settings.work / f"scratch-{name}", settings.budget_bytes)
        finally:
            worker.close()
        drop_cache([*self._files, *(settings.work / f"scratch-{name}").rglob("*.safetensors")])

    def _turn(self, name: str, result: Result) -> None:
        worker = self._workers[name]
        if self._dropping:
            self._drop()
        logits = self._settings.work / f"{name}.logits"
        done = worker.passes(TURN_PASSES, untimed=1, logits=logits)
        worker.wait_until_quiet()
        result.seconds += done["seconds"]
        result.read_bytes += done["read_bytes"]
        result.told, result.logits = done["told"], logits
        if name in self._cages:
            result.cage_peak_bytes = self._cages[name].peak_bytes()
        print(f"# {name:10} {' '.join(f'{value:.2f}' for value in done['seconds'])} s a pass", file=sys.stderr, flush=True)

    def _drop(self) -> None:
        files = [*self._files, *self._settings.work.rglob("*.safetensors")]
        for name, worker in self._workers.items():
            if not self.results[name].error:
                worker.forget(files)
        drop_cache(file for file in files if file.is_file())


IMPORTS: dict[str, Sequence[str]] = {
    "ours": ("transformers", "accelerate", "overflowml"),
    "accelerate": ("transformers", "accelerate"),
    "mmap": ("transformers", "accelerate"),
    "airllm": ("transformers", "accelerate", "airllm"),
    "resident": ("transformers", "accelerate"),
}


def measure(settings: Settings, report: Report, notes: list[str]) -> list[dict[str, Any]]:
    """Run the contest and add its figures to the report. Returns a row for each side."""
    with Contest(settings, notes) as contest:
        contest.run()
        results, rates = contest.results, {k: statistics.median(found) for k, found in contest.rates.items()}
        differences = _differences(results)
    report.add("disk.weights_bytes", sum(file.stat().st_size for file in weight_files(settings.model)), "bytes")
    report.add("disk.budget_bytes", settings.budget_bytes, "bytes")
    report.add("disk.limit_bytes", settings.limit_bytes, "bytes")
    for in_flight, rate in rates.items():
        report.add(f"disk.direct_rate.in_flight_{in_flight}", rate, "bytes/s")
    add_figures(report, results, max(rates.values()))
    for name, difference in differences.items():
        report.add(f"disk.{name}.max_abs_difference", difference, "of a logit, from resident")
    return [_row(name, result, results) for name, result in results.items()]


def add_figures(report: Report, results: dict[str, Result], rate_bytes_per_s: float) -> None:
    """Figures of the sides that ran: passes, bytes, and ours against the limit and against the others.

    Args:
        report: gets them.
        results: by side.
        rate_bytes_per_s: what the disk can do.
    """
    timed = {name: result for name, result in results.items() if result.seconds}
    for name, result in timed.items():
        report.add(f"disk.{name}.pass_s", result.pass_s, "s")
        report.add(f"disk.{name}.read_bytes", statistics.median(result.read_bytes), "bytes a pass")
    ours = timed.get("ours")
    if ours is None:
        return
    streamed_bytes = ours.told["streamed_bytes"]
    report.add("disk.ours.streamed_bytes", streamed_bytes, "bytes a pass, by its own account")
    report.add("disk.ours.peak_over_budget", ours.told["peak_bytes"] / ours.told["budget_bytes"], "ratio, by its own account")
    # What the kernel counted, where it counts: more than the engine asked for is waste, less would be the page cache's help.
    counted_bytes = statistics.median(ours.read_bytes) or streamed_bytes
    read_bytes = min(streamed_bytes, counted_bytes)
    report.add("disk.read_fraction", read_bytes / ours.pass_s / rate_bytes_per_s, "of the direct rate")
    if "resident" in timed:
        limit_s = max(timed["resident"].pass_s, read_bytes / rate_bytes_per_s)
        report.add("disk.limit_s", limit_s, "s")
        report.add("disk.over_limit", ours.pass_s / limit_s, "ratio")
    for name in ("accelerate", "airllm", "mmap"):
        if name in timed:
            report.add(f"disk.vs_{name}", timed[name].pass_s / ours.pass_s, "times as fast")


def _differences(results: dict[str, Result]) -> dict[str, float]:
    """Largest difference of a logit from the resident side's, by side."""
    import torch

    def logits(result: Result) -> torch.Tensor:
        assert result.logits is not None
        return torch.frombuffer(bytearray(result.logits.read_bytes()), dtype=torch.float32)

    there = {name: result for name, result in results.items() if result.logits is not None}
    if "resident" not in there:
        return {}
    right = logits(there.pop("resident"))
    return {name: float((logits(result) - right).abs().max()) for name, result in there.items()}


def _row(name: str, result: Result, results: dict[str, Result]) -> dict[str, Any]:
    if not result.seconds:
        return {"side": name, "error": result.error or "no pass"}
    ours = results.get("ours")
    return {
        "side": name,
        "load_s": result.load_s,
        "pass_s": result.pass_s,
        "least_s": min(result.seconds),
        "most_s": max(result.seconds),
        "read_bytes": statistics.median(result.read_bytes),
        "cage_peak_bytes": result.cage_peak_bytes,
        "over_ours": result.pass_s / ours.pass_s if ours and ours.seconds else None,
        "error": result.error,
    }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| side | load | pass, median | least to most | read a pass | most memory, cache included | times ours | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "pass_s" not in row:
            lines.append(f"| {row['side']} | | | | | | | {_cell(row['error'])} |")
            continue
        peak = f"{row['cage_peak_bytes'] / 1e9:.2f} GB" if row["cage_peak_bytes"] else "no limit"
        times = f"{row['over_ours']:.2f}" if row["over_ours"] else ""
        spread = f"{row['least_s']:.2f} to {row['most_s']:.2f} s"
        read = f"{row['read_bytes'] / 1e9:.2f} GB"
        cells = [row["side"], f"{row['load_s']:.1f} s", f"{row['pass_s']:.2f} s", spread, read, peak, times, _cell(row["error"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
