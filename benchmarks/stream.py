"""The streaming engine against its peers and the limit: the disk tier, loading, the simulated clock, hooks, and on CUDA the RAM tier.

    python benchmarks/stream.py --airllm VENV/bin/python --json benchmarks/results/stream.json --table benchmarks/results/stream.md

Parts: disk (one-token passes of a model larger than its memory limit), load (memory and seconds of loading it), sim (passes against the
lower bound, and trials, on the virtual accelerator's clock), hook (Python overhead a block), ram (needs a CUDA device). Without --part
all run that can run here. The machine should do nothing else meanwhile. A side that fails is reported with its error; the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stream_disk
import stream_load
import torch
from report import Report
from stream_model import READY, Shape, make_model, weight_files

from overflowml_core.errors import OverflowmlError
from overflowml_core.units import parse_bytes

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("disk", "load", "sim", "hook", "ram")
SIMULATED_CASES = 50
_SIMULATED = {
    "max_over_bound": "ratio",
    "mean_over_bound": "ratio",
    "within": "of the cases within 1.03",
    "max_over_floor": "ratio",
    "within_floor": "of the cases within 1.03",
}
_MEASURE = "import importlib, json, sys; print(json.dumps(importlib.import_module(sys.argv[1]).measure(**json.loads(sys.argv[2]))))"
QUICK = Shape(hidden=512, intermediate=1408, layers=12, heads=8, kv_heads=8, vocabulary=8000)
"""A model of 93 MB, to try the script."""


class Run:
    """One run: its report, its notes and its tables."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.report = Report("stream")
        self.notes: list[str] = []
        self.tables: list[tuple[str, str]] = []

    def settings(self) -> stream_disk.Settings:
        """Of the disk and load parts; makes the model where none is given."""
        options = self.options
        model = Path(options.model) if options.model else self.work / "model"
        if not options.model and not (model / READY).exists():
            print(f"# making a model in {model}", file=sys.stderr, flush=True)
            make_model(model, QUICK if options.quick else Shape())
        weight_files(model)
        return stream_disk.Settings(
            model=model.resolve(),
            work=self.work,
            budget_bytes=parse_bytes(options.budget, "--budget"),
            allowance_bytes=parse_bytes(options.allowance, "--allowance"),
            passes=options.passes,
            airllm=options.airllm,
            sides=tuple(options.sides.split(",")),
            threads=options.threads,
        )

    def disk(self) -> None:
        """Passes from the disk."""
        self.tables.append(("Passes from the disk", stream_disk.table(stream_disk.measure(self.settings(), self.report, self.notes))))

    def load(self) -> None:
        """Loads."""
        rounds = 1 if self.options.quick else 3
        self.tables.append(("Loading", stream_load.table(stream_load.measure(self.settings(), self.report, self.notes, rounds))))

    def sim(self) -> None:
        """The virtual accelerator's clock: passes against the lower bound, and plans after their trial against the best split."""
        cases = 5 if self.options.quick else SIMULATED_CASES
        found = self._measured("simulated", cases=cases)
        self._add(found, "sim", _SIMULATED)
        found = self._measured("trials", count=cases)
        self._add(found, "sim.trial", {"max_over_best": "ratio", "max_planned_over_best": "ratio, before the trials"})

    def hook(self) -> None:
        """Python overhead of a streamed block."""
        found = self._measured("hooks")
        if "overflowml" in found:
            self.report.add("hook.us_per_block", found.pop("overflowml"), "us")
        for name, value in found.items():
            self.report.add(f"hook.{name}.us_per_block", value, "us")

    def ram(self) -> None:
        """Steps from RAM, on an accelerator."""
        import stream_ram

        self.tables += stream_ram.measure(stream_ram.settings_of(self.options), self.report, self.notes)

    def _add(self, found: dict[str, Any], prefix: str, units: dict[str, str]) -> None:
        for name, unit in units.items():
            if name in found:
                self.report.add(f"{prefix}.{name}", found[name], unit)

    def _measured(self, module: str, **arguments: Any) -> dict[str, Any]:
        """What another benchmark's ``measure`` found; nothing and a note where it fails.

        In a process of its own: the virtual accelerator, once installed, would be taken for this machine's.
        """
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, module, json.dumps(arguments)],
            cwd=self.work,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            self.notes.append(f"benchmarks/{module}.py: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
            print(self.notes[-1], file=sys.stderr, flush=True)
            return {}
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def write(self) -> None:
        """The JSON and the table, where they were asked for."""
        if self.options.json:
            document = {**self.report.document(), "notes": self.notes}
            self.options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if self.options.table:
            parts = [f"## {title}\n\n{text}" for title, text in self.tables]
            if self.notes:
                parts.append("## Notes\n\n" + "\n".join(f"- {' '.join(note.split())}" for note in self.notes) + "\n")
            self.options.table.write_text("\n".join(parts), encoding="utf-8")


def parts_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The parts to run: those asked for, else all that can run here."""
    return tuple(options.part) if options.part else tuple(part for part in PARTS if part != "ram" or torch.cuda.is_available())


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", action="append", choices=PARTS, help="may be given more than once")
    made.add_argument("--model", help="folder of a causal language model in safetensors; without it a Llama of 6.6 GB is made")
    made.add_argument("--budget", default="1.5GB", help="of each side in the disk and load parts")
    made.add_argument("--allowance", default="1GB", help="memory of a process beside its budget: the interpreter and its libraries")
    made.add_argument("--passes", type=int, default=6, help="timed passes of each side in the disk part")
    made.add_argument("--sides", default=",".join((*stream_disk.CAGED, "resident")), help="of the disk part, separated by commas")
    made.add_argument("--airllm", metavar="PYTHON", help="an interpreter that has AirLLM 4, whose dependencies are its own")
    made.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves them to torch")
    made.add_argument("--budgets", default="4GB,8GB,12GB,16GB", help="of the ram part")
    made.add_argument("--reserve", default="1GB", help="of each budget in the ram part, for activations")
    made.add_argument("--device", help="of the ram part; cpu tries the script on a small model")
    made.add_argument("--soak", type=int, default=100, help="passes of the ram part's endurance test")
    made.add_argument("--work", type=Path, help="for models, copies and logs; a temporary folder without it")
    made.add_argument("--keep", action="store_true", help="leave what was put into the work folder")
    made.add_argument("--json", type=Path)
    made.add_argument("--table", type=Path, help="write the rows as Markdown")
    made.add_argument("--quick", action="store_true", help="a model of 93 MB under 75 MB, two passes: tries the script, measures nothing")
    return made


def main() -> None:
    """Read the arguments, measure, write, clean up."""
    options = parser().parse_args()
    if options.quick:
        options.passes, options.budget, options.soak = 2, options.budget if options.model else "75MB", 20
    # A run that is ended from outside cleans up as one that is interrupted.
    signal.signal(signal.SIGTERM, _interrupted)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="overflowml-stream-", dir=options.work))
    try:
        run = Run(options, work)
        steps: dict[str, Callable[[], None]] = {name: getattr(run, name) for name in PARTS}
        for part in parts_of(options):
            try:
                steps[part]()
            except (OSError, ImportError, OverflowmlError) as error:
                run.notes.append(f"{part}: {type(error).__name__}: {error}")
                print(run.notes[-1], file=sys.stderr, flush=True)
        run.write()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
