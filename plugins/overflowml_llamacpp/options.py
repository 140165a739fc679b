"""The options of ``overflowml llamacpp``, as a value. Finds nothing and decides nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

CACHES = {"f16": ("f16",), "q8_0": ("q8_0",), "q4_0": ("q4_0",), "auto": ("f16", "q8_0")}
"""What ``--kv`` may be, and the types of the cache that it permits, the most precise first."""

_MACHINE = "Machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a user asked for, as it was written."""

    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The model, or any part of a split one.", show_default=False)]
    ctx: Annotated[int | None, typer.Option(help="Tokens of the context; 8192 by default, or the model's own if that is shorter.")] = None
    vram_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What llama.cpp may take of the device, such as 12GB; by default what is free now.")
    ] = None
    kv: Annotated[
        str, typer.Option(metavar="f16|q8_0|q4_0|auto", help="Type of the cache; auto takes q8_0 where a token is 3 % faster for it.")
    ] = "f16"
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='Plan for this accelerator in place of the one here: "RTX 4090".', rich_help_panel=_MACHINE),
    ] = None
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --gpu, all RAM of that machine, such as 64GB.", rich_help_panel=_MACHINE)
    ] = None
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for the machine in this file, as detect --json writes it.", rich_help_panel=_MACHINE),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else, errors too.")] = False


def takes_asked(command: Callable[[Asked], None]) -> Callable[..., None]:
    """Have typer offer the fields of Asked, and call the command with an Asked."""
    hints = get_type_hints(Asked, include_extras=True)
    defaults = inspect.signature(Asked).parameters

    def called(**given: Any) -> None:
        command(Asked(**given))

    offered = [defaults[field.name].replace(annotation=hints[field.name]) for field in fields(Asked)]
    called.__signature__ = inspect.Signature(offered)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in offered}
    called.__doc__, called.__name__ = command.__doc__, command.__name__
    return called
