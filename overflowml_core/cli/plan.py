"""``overflowml plan``: where every weight of a model would live and how long it would take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from overflowml_core.cli.files import check_target, write_file
from overflowml_core.cli.options import JsonOption, Request, takes_request
from overflowml_core.errors import OverflowmlError

if TYPE_CHECKING:
    from overflowml_core.cli.question import Question
    from overflowml_core.plan import Plan

_FILES = "Files"


@takes_request
def plan(
    request: Request,
    compare: Annotated[bool, typer.Option("--compare", help="Show all ways side by side, with the reasons.")] = False,
    as_json: JsonOption = False,
    machines: Annotated[
        Path | None,
        typer.Option(
            "--machines",
            metavar="FILE",
            help="Say how many of the machines in this file a language model takes, and what starts it on them (vLLM, torchrun).",
            rich_help_panel="Machine",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the plan as one page for a browser.", rich_help_panel=_FILES)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write the timeline for ui.perfetto.dev.", rich_help_panel=_FILES)
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the plan as JSON; 'explain' reads it.", rich_help_panel=_FILES)
    ] = None,
) -> None:
    """Show where every weight of a model would live and how long it would take, before anything is loaded."""
    if machines is not None:
        if compare or html or trace or save:
            raise OverflowmlError("--compare, --html, --trace and --save are of a plan for one machine; leave them out, or --machines")
        from overflowml_core.cli.serving import plan_machines

        plan_machines(request, machines, as_json)
        return
    from overflowml_core.cli.question import question_of

    files = {"--html": html, "--trace": trace, "--save": save}
    for option, path in files.items():
        check_target(path, option)
    question = question_of(request)
    made = question.plan(outlook=as_json or html is not None or save is not None)
    _write(made, question, files)
    if as_json:
        typer.echo(made.to_json())
        return
    _print(made, question, request.source, compare)
    _tell(files)


def _print(made: Plan, question: Question, source: str, compare: bool) -> None:
    from overflowml_core.cli.screen import Screen

    screen = Screen()
    if compare:
        from overflowml_core.cli.tables import show_comparison

        show_comparison(screen, made, question.machine, question.network.source or source)
        return
    for line in made.summary().splitlines():
        screen.text(line)


def _write(made: Plan, question: Question, files: dict[str, Path | None]) -> None:
    if files["--html"] is not None:
        from overflowml_core.cli.page import page_of

        write_file(files["--html"], page_of(made, question.timeline(made), question.machine, question.network.source), "--html")
    if files["--trace"] is not None:
        from overflowml_core.cli.trace import trace_of

        write_file(files["--trace"], trace_of(made, question.timeline(made)), "--trace")
    if files["--save"] is not None:
        write_file(files["--save"], made.to_json() + "\n", "--save")


def _tell(files: dict[str, Path | None]) -> None:
    written = [f"{option}: {path}" for option, path in files.items() if path is not None]
    if written:
        from overflowml_core.cli.screen import Screen

        screen = Screen(stderr=True)
        for line in written:
            screen.text(f"written {line}", "dim")
