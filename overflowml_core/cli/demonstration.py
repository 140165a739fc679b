"""``overflowml demo``: two real models in a third of their own size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures and summary.json.")] = Path("demo"),
    only: Annotated[str | None, typer.Option(help="Run one part: smollm2 or flux.")] = None,
) -> None:
    """Run two real models in a third of their own size, and compare with the plain runs."""
    from overflowml_core.cli.demo import run_demo

    raise typer.Exit(run_demo(output, only))
