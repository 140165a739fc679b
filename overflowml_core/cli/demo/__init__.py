"""`overflowml demo`: two models under a third of their memory, compared with the plain run, byte for byte. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]


def run_demo(output: Path = Path("demo"), only: str | None = None, console: Console | None = None) -> int:
    """Run the demo; see :func:`overflowml_core.cli.demo.command.run_demo`."""
    # Imported here, so that the measured processes, which are modules of this package, do not carry it.
    from overflowml_core.cli.demo.command import run_demo as run

    return run(output, only, console)
