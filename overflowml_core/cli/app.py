"""Assembles the commands and turns the project's errors into one line and an exit status.

Exit status: 0 done, 1 the answer is no (a demo that failed, a plan that does not fit), 2 wrong input.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from overflowml._version import __version__
from overflowml_core.cli import commands
from overflowml_core.errors import DoesNotFit, OverflowmlError

EXIT_NO = 1
EXIT_WRONG_INPUT = 2

app = typer.Typer(
    name="overflowml",
    help="Run AI models larger than the GPU, with a plan that can be read first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"overflowml {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Run AI models larger than the GPU, with a plan that can be read first."""


app.command("plan")(commands.plan)
app.command("detect")(commands.detect)
app.command("demo")(commands.demo)


def run() -> None:
    """Run the command line and exit with its status."""
    try:
        app()
    except OverflowmlError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"overflowml: {error}", markup=False)
        sys.exit(EXIT_NO if isinstance(error, DoesNotFit) else EXIT_WRONG_INPUT)
