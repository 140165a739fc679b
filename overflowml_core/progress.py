"""The bar that shows how far weights are while they are brought in: bytes, rate and time left, on standard error of a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from overflowml_core.environment import shows_progress


@contextlib.contextmanager
def loading_bar(wanted: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the context is open; it leaves no line behind.

    Args:
        wanted: whether the host shows its own bars.

    Yields:
        What to call with the bytes brought in so far, and in all. It does nothing where no bar is wanted or standard error is no terminal.
    """
    if not (wanted and shows_progress() and sys.stderr is not None and sys.stderr.isatty()):
        yield _nothing
        return
    # Only here: rich takes longer to import than a small model to load.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Bringing in weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _nothing(done: int, total: int) -> None:
    pass
