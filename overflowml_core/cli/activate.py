"""``overflowml activate`` and ``overflowml deactivate``: have every interpreter of an environment install the hosts, or no more."""

from __future__ import annotations

from typing import Annotated

import typer


def activate(
    user: Annotated[bool, typer.Option("--user", help="Write into your own site-packages, outside virtual environments.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Change an environment that is no virtual one.")] = False,
) -> None:
    """Let tools that load models by themselves take device_map="overflowml", in every interpreter of this environment."""
    from overflowml_core import activation

    path, written = activation.activate(activation.this_environment(), user=user, force=force)
    typer.echo(f"{path}: {'written' if written else 'was there already'}")
    if written:
        typer.echo(
            "from now on transformers and diffusers know overflowml as soon as they are imported; undo it with: overflowml deactivate"
        )


def deactivate() -> None:
    """Take back what activate did."""
    from overflowml_core import activation

    removed = activation.deactivate(activation.this_environment())
    for path in removed:
        typer.echo(f"{path}: removed")
    if not removed:
        typer.echo("this environment was not activated; nothing to do")
