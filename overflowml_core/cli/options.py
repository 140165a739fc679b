"""The options that ask for a plan, written down once for every command that takes them. Finds nothing and plans nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_MACHINE, _WORK, _LIMITS = "Machine", "Work", "Limits"
_SIZE = "such as 8GB or 512MiB"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else, errors too.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked to have planned, as it was written."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, a Hub id (owner/name), a .gguf or .safetensors file, or the size of the weights (40 or 40GB).",
            show_default=False,
        ),
    ]
    vram: Annotated[
        str | None, typer.Option(help=f"Budget of the compute tier, {_SIZE}; what is free by default.", rich_help_panel=_LIMITS)
    ] = None
    ram: Annotated[
        str | None,
        typer.Option(help=f"RAM for weights outside the device, {_SIZE}; with --gpu all RAM of that machine.", rich_help_panel=_LIMITS),
    ] = None
    reserve: Annotated[
        str | None,
        typer.Option(help=f"Part of the budget kept for activations, {_SIZE}, or 0; estimated by default.", rich_help_panel=_LIMITS),
    ] = None
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="lossless|minimal|any",
            help="The most that may be done to the result: nothing; FP8 or INT8 weights and VAE tiles; any format. "
            "Nothing by default for a model that can be loaded, minimal for a size.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    no_quantize: Annotated[bool, typer.Option("--no-quantize", help="Convert no weights.", rich_help_panel=_LIMITS)] = False
    no_disk: Annotated[bool, typer.Option("--no-disk", help="Let no weight wait on disk.", rich_help_panel=_LIMITS)] = False
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Plan for this accelerator in place of the one that is here: "RTX 4090", "M4 Max 128GB", "2x RTX 3060".',
            rich_help_panel=_MACHINE,
        ),
    ] = None
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for the machine in this file, as detect --json writes it.", rich_help_panel=_MACHINE),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="As from_pretrained takes it: bfloat16, float16, float32.", rich_help_panel=_WORK),
    ] = None
    moe: Annotated[
        tuple[float, float, int, int] | None,
        typer.Option(
            metavar="T A E K",
            help="SOURCE is the size of a mixture of experts: T billion weights, A of them active, E experts, K for each token.",
            rich_help_panel=_WORK,
        ),
    ] = None
    height: Annotated[int | None, typer.Option(help="Height of an image in pixels.", rich_help_panel=_WORK)] = None
    width: Annotated[int | None, typer.Option(help="Width of an image in pixels.", rich_help_panel=_WORK)] = None
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.", rich_help_panel=_WORK)] = None
    batch: Annotated[int, typer.Option(help="Images or sequences at once.", rich_help_panel=_WORK)] = 1
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_WORK)] = None
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.", rich_help_panel=_WORK)] = None
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.", rich_help_panel=_WORK)] = None


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """Have typer offer the fields of Request before a command's own options, and call the command with a Request as its first argument."""
    hints = get_type_hints(Request, include_extras=True)
    empty = inspect.Parameter.empty
    asked = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(field.name, empty), annotation=hints[field.name])
        for field in fields(Request)
    ]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        request = Request(**{field.name: given.pop(field.name) for field in fields(Request)})
        command(request, **given)

    # Typer reads the signature; what it would read of the wrapped function is not what is called.
    called.__signature__ = inspect.Signature([*asked, *options])  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*asked, *options)}
    del called.__wrapped__  # type: ignore[attr-defined]
    return called


def _default_of(name: str, empty: Any) -> Any:
    return inspect.signature(Request).parameters[name].default if name != "source" else empty
