"""``overflowml calibrate``: measures how fast this machine is, and keeps the answer for all later plans."""

from __future__ import annotations

from typing import Annotated

import typer

from overflowml_core.cli.options import JsonOption


def calibrate(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="Measure the operations of this model too, one by one.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller measurements.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure copies, memory, disk and arithmetic of this machine; takes seconds, and plans rest on it from then on."""
    from overflowml_core import session
    from overflowml_core.cli.screen import Screen

    told = Screen(stderr=True)
    machine = session.calibrate(lambda step: told.text(f"measuring {step}", "dim") if told.is_terminal else None, quick, source)
    if as_json:
        from overflowml_core.inspect.machine_file import machine_to_json

        typer.echo(machine_to_json(machine))
        return
    from overflowml_core.cli.machine_tables import show_rates

    show_rates(Screen(), machine)
