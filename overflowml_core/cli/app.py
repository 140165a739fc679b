"""Assembles the commands; how they end is in ``ending``. A plugin's commands are asked for when a word is none of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from overflowml_core.cli import (
    activate,
    cache,
    calibrate,
    can_run,
    demonstration,
    detect,
    doctor,
    ending,
    explain,
    pictures,
    plan,
    report,
    tune,
)


def _markup() -> str | None:
    # Panels are for people; what is piped stays plain, and starts faster.
    return "rich" if sys.stdout is not None and sys.stdout.isatty() else None


app = typer.Typer(
    name="overflowml",
    help="Run AI models larger than the GPU, with a plan that can be read first.",
    epilog=ending.EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=_markup(),  # type: ignore[arg-type]
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from overflowml._version import __version__

        typer.echo(f"overflowml {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Run AI models larger than the GPU, with a plan that can be read first."""


_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "plan": (plan.plan, "Show where every weight would live, and how long it takes."),
    "can-run": (can_run.can_run, "Say whether a model runs: status 0, 1 or 2."),
    "explain": (explain.explain, "Say why a saved plan is as it is."),
    "detect": (detect.detect, "Show this machine as plans see it."),
    "calibrate": (calibrate.calibrate, "Measure this machine's rates."),
    "tune": (tune.tune, "Run a model under several plans and keep the fastest."),
    "run": (pictures.pictures, "Make a picture for each prompt of a file."),
    "report": (report.report, "Show what was counted of routed experts while models ran."),
    "doctor": (doctor.doctor, "Examine this environment."),
    "cache": (cache.cache, "List packed weights that are kept, or remove them."),
    "activate": (activate.activate, "Install the hosts in every interpreter here."),
    "deactivate": (activate.deactivate, "Take back what activate did."),
    "demo": (demonstration.demo, "Run two real models under a budget."),
}
for _name, (_command, _words) in _COMMANDS.items():
    app.command(_name, short_help=_words, epilog=ending.EPILOG)(_command)


def _add_plugins_commands(arguments: list[str]) -> None:
    """Ask plugins for their commands, unless the first word is one of ours: loading plugins takes longer than everything else here."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    if arguments == ["--version"] or (words and words[0] in _COMMANDS):
        return
    from overflowml_core import session

    session.plugins().register_commands(app)


def run() -> None:
    """Run the command line and exit with its status."""

    def command() -> object:
        _add_plugins_commands(sys.argv[1:])
        return app(standalone_mode=False)

    sys.exit(ending.ended(command, sys.argv[1:]))
