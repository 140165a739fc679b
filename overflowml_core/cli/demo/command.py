"""What `overflowml demo` does, in order: files, a direct and a managed run of each case, tables, pictures, verdict."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from overflowml_core.cli.demo.cache import build_once, weights_bytes
from overflowml_core.cli.demo.cases import BUILD, CASES, DIRECT, MANAGED, CaseInfo
from overflowml_core.cli.demo.faults import ChildFailed, DemoUnavailable
from overflowml_core.cli.demo.picture import draw_memory
from overflowml_core.cli.demo.process import Job, run_job
from overflowml_core.cli.demo.results import Comparison, Measured, write_summary
from overflowml_core.cli.demo.table import comparison_table
from overflowml_core.environment import cache_folder

_BUDGET_PART = 3
"""The budget is the weights divided by this."""


def run_demo(output: Path = Path("demo"), only: str | None = None, console: Console | None = None) -> int:
    """Run the demo.

    Args:
        output: folder for summary.json and the pictures; made where it is missing.
        only: name of one case; None runs all.
        console: where to write; None takes standard output.

    Returns:
        0 when every run under a budget gave the same result as the direct one and kept to its budget, else 1.

    Raises:
        DemoUnavailable: a package, room on the disk, or the case of that name is missing.
    """
    console = console or Console()
    chosen = _choose(only)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoUnavailable(f"{output} cannot be made ({error.strerror or error})", "name another folder with --output") from error
    comparisons: list[Comparison] = []
    broken: list[tuple[str, str]] = []
    for info in chosen:
        console.rule(escape(info.title))
        try:
            comparison = _compare(info, output, console)
        except ChildFailed as error:
            console.print(escape(str(error)), style="red")
            broken.append((info.name, str(error)))
            continue
        comparisons.append(comparison)
        draw_memory(comparison, output / f"{info.name}-memory.png")
        console.print(f"answer: {escape(comparison.managed.output)}")
        console.print(comparison_table(comparison))
    write_summary(output / "summary.json", comparisons, broken)
    failures = [line for comparison in comparisons for line in comparison.failures()] + [f"{name}: did not finish" for name, _ in broken]
    for line in failures:
        console.print(f"FAILED {escape(line)}", style="bold red")
    if not failures:
        console.print(f"All identical and within budget. Pictures and summary.json: {escape(str(output))}", style="green")
    return 1 if failures else 0


def _choose(only: str | None) -> tuple[CaseInfo, ...]:
    names = ", ".join(info.name for info in CASES)
    chosen = tuple(info for info in CASES if only in (None, info.name))
    if not chosen:
        raise DemoUnavailable(f"there is no case {only!r}", f"choose one of {names}")
    # All at once and first: nobody waits minutes to hear that the last step cannot run.
    needed = dict(package for info in chosen for package in info.packages)
    needed["matplotlib"] = "pip install 'overflowml[plot]'"
    for package, remedy in needed.items():
        if importlib.util.find_spec(package) is None:
            raise DemoUnavailable(f"the package {package} is not installed", remedy)
    return chosen


def _compare(info: CaseInfo, output: Path, console: Console) -> Comparison:
    folder = cache_folder() / info.folder
    with tempfile.TemporaryDirectory(prefix="overflowml-demo-") as scratch, _progress(console) as start:

        def run(mode: str, model: Path, budget_bytes: int | None = None) -> Measured | None:
            work = Path(scratch) / mode
            work.mkdir(exist_ok=True)
            job = Job(info.name, mode, model, work, budget_bytes, info.reserve_bytes)
            return run_job(job, start(job.title))

        build_once(folder, info.disk_bytes, lambda work: _discard(run(BUILD, work)))
        total_bytes = weights_bytes(folder)
        budget_bytes = total_bytes // _BUDGET_PART
        direct = run(DIRECT, folder)
        managed = run(MANAGED, folder, budget_bytes)
        assert direct is not None
        assert managed is not None
        comparison = Comparison(info.name, info.title, total_bytes, budget_bytes, info.allowance_bytes, direct, managed)
        _keep_image(Path(scratch), output, info.name, comparison.identical)
    return comparison


def _discard(_: object) -> None:
    """A build has no result."""


def _keep_image(scratch: Path, output: Path, name: str, identical: bool) -> None:
    for mode, target in ((MANAGED, f"{name}.png"), (DIRECT, f"{name}-direct.png")):
        image = scratch / mode / "image.png"
        # The direct one is kept only where it shows a difference.
        if image.exists() and (mode == MANAGED or not identical):
            shutil.copyfile(image, output / target)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], Callable[[dict[str, Any]], None]]]:
    """A progress bar that has a line for each run; calling what it yields starts a line and returns its watcher."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def start(title: str) -> Callable[[dict[str, Any]], None]:
            for earlier in progress.tasks:
                progress.update(earlier.id, total=1, completed=1, stage="done")
            task = progress.add_task(title, total=None, stage="starting")

            def watch(event: dict[str, Any]) -> None:
                if "plan" in event:
                    # As the plan wrote it: its columns must not be wrapped.
                    progress.console.print(str(event["plan"]), markup=False, highlight=False, soft_wrap=True)
                elif "stage" in event:
                    total = int(event["total"])
                    progress.update(task, stage=str(event["stage"]), total=total if total > 1 else None, completed=int(event["done"]))

            return watch

        yield start
        for task in progress.tasks:
            progress.update(task.id, total=1, completed=1, stage="done")
