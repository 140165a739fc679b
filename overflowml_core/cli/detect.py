"""``overflowml detect``: this machine as plans see it."""

from __future__ import annotations

import typer

from overflowml_core.cli.options import JsonOption


def detect(as_json: JsonOption = False) -> None:
    """Show this machine as plans see it: accelerators, memory, rates. The JSON is what --machine takes."""
    from overflowml_core import session

    machine = session.detect()
    if as_json:
        from overflowml_core.inspect.machine_file import machine_to_json

        typer.echo(machine_to_json(machine))
        return
    from overflowml_core.cli.machine_tables import show_machine
    from overflowml_core.cli.screen import Screen

    show_machine(Screen(), machine)
