"""``overflowml doctor``: what is wrong with this environment, and the command that sets it right.

Exit status: 0 where nothing failed, warnings or not; 1 else.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from overflowml_core.doctor import Report


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False) -> None:
    """Examine this environment: versions, devices, memory, settings, known traps."""
    report = _examine()
    if as_json:
        typer.echo(json.dumps(report.document(), indent=2))
    else:
        _show(report)
    raise typer.Exit(0 if report.ok else 1)


def _examine() -> Report:
    from overflowml_core import environment, session
    from overflowml_core.doctor import examine, gather

    plugins = session.plugins()
    return examine(gather(session.detect(), environment.cache_folder(), os.environ, plugins.names(), plugins.faults))


_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print("=== OverflowML Doctor ===", style="bold", markup=False)
    for title, rows in (("Environment", report.environment), ("Hardware", report.hardware)):
        console.print(title, style="bold", markup=False)
        for label, value in rows:
            console.print(f"  {label}: {value}", markup=False)
    console.print("Checks", style="bold", markup=False)
    for check in report.checks:
        console.print(Text.assemble("  ", (f"[{check.level}]", _STYLES[check.level]), f" {check.text}"))
        if check.fix:
            console.print(f"         Fix: {check.fix}", markup=False)
    levels = [check.level for check in report.checks]
    console.print(f"{levels.count('PASS')} passed, {levels.count('WARN')} to look at, {levels.count('FAIL')} failed", markup=False)
