"""The bar that shows how many pictures are there, on standard error of a terminal; a line for each batch elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from overflowml_core.environment import shows_progress


@contextlib.contextmanager
def pictures_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Show how far a run is while the context is open.

    Yields:
        What to call with the pictures that are there, and in all, and with a note that stands beside them.
    """
    if not shows_progress() or sys.stderr is None:
        yield lambda done, total, note: None
        return
    if not sys.stderr.isatty():
        yield _write_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Pictures", total=None)
        yield lambda done, total, note: bar.update(task, completed=done, total=total, description=_named(note))


def _named(note: str) -> str:
    return f"Pictures ({note})" if note else "Pictures"


def _write_line(done: int, total: int, note: str) -> None:
    sys.stderr.write(f"overflowml: {done} of {total} pictures{f' ({note})' if note else ''}\n")
    sys.stderr.flush()
