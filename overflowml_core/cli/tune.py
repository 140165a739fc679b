"""``overflowml tune``: runs a model under several plans, and keeps the fastest for all later loads with the same limits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overflowml_core.cli.options import JsonOption
from overflowml_core.errors import OverflowmlError

if TYPE_CHECKING:
    from overflowml_core.cli.tuning.hosts import Request
    from overflowml_core.cli.tuning.tuner import Outcome
    from overflowml_core.facts import Bytes, Workload
    from overflowml_core.plan import Plan

_LIMITS, _WORK = "Limits", "Work"
_SIZE = "such as 8GB or 512MiB"


def tune(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="The folder of a transformers model or a diffusers pipeline.", show_default=False),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option("--budget", "--vram", help=f"Budget of the compute tier, {_SIZE}; what is free by default.", rich_help_panel=_LIMITS),
    ] = None,
    ram: Annotated[str | None, typer.Option(help=f"RAM for weights outside the device, {_SIZE}.", rich_help_panel=_LIMITS)] = None,
    reserve: Annotated[str | None, typer.Option(help=f"Part of the budget kept for activations, {_SIZE}.", rich_help_panel=_LIMITS)] = None,
    dtype: Annotated[str | None, typer.Option(help="As from_pretrained takes it, such as bfloat16.", rich_help_panel=_WORK)] = None,
    height: Annotated[int | None, typer.Option(help="Height of an image in pixels.", rich_help_panel=_WORK)] = None,
    width: Annotated[int | None, typer.Option(help="Width of an image in pixels.", rich_help_panel=_WORK)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_WORK)] = None,
    batch: Annotated[int, typer.Option(help="Images or sequences at once.", rich_help_panel=_WORK)] = 1,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.", rich_help_panel=_WORK)] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.", rich_help_panel=_WORK)] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to run, about; loading comes on top.")] = 60.0,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what was kept, of SOURCE or of all models, and run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a model under several plans for a minute and keep the fastest: later loads with the same limits use it."""
    from overflowml_core.facts import Workload

    if forget:
        _forget(source, as_json)
        return
    if source is None:
        raise OverflowmlError("SOURCE is missing; give the folder of a transformers model or a diffusers pipeline")
    asked = Workload(height=height, width=width, steps=steps, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    _tune(_request(source, (vram, ram, reserve), dtype, asked), seconds, as_json)


def _request(source: str, sizes: tuple[str | None, str | None, str | None], dtype: str | None, asked: Workload) -> Request:
    from overflowml_core.cli.question import torch_dtype
    from overflowml_core.cli.tuning.hosts import Request, check_source
    from overflowml_core.facts import Limits, Workload

    folder = Path(source)
    check_source(folder)
    vram, ram, reserve = sizes
    limits = Limits(_size(vram, "--budget"), _size(ram, "--ram"), _size(reserve, "--reserve"))
    # A load says nothing of the work; what is tuned for it must be found by it.
    return Request(folder, limits, None if asked == Workload() else asked, {} if dtype is None else {"torch_dtype": torch_dtype(dtype)})


def _size(text: str | None, option: str) -> Bytes | None:
    from overflowml_core.facts import Bytes
    from overflowml_core.units import parse_bytes

    if option == "--reserve" and text is not None and text.strip() == "0":
        return Bytes(0)
    return None if text is None else Bytes(parse_bytes(text, option))


def _tune(request: Request, seconds: float, as_json: bool) -> None:
    from overflowml_core import planning, session
    from overflowml_core.cli.screen import Screen
    from overflowml_core.cli.tuning.tuner import tune as run
    from overflowml_core.tuned import save_tuned

    told = Screen(stderr=True)
    machine = session.detect()
    network = session.describe(request.folder, request.workload, request.options)
    base = planning.make_plan(network, request.limits, request.workload, machine)
    if not base.managed:
        _show_untuned(base, as_json)
        return
    outcome = run(request, base, machine, seconds, lambda step: told.text(step, "dim") if told.is_terminal else None)
    path = save_tuned(outcome.tuned, base, machine)
    if as_json:
        typer.echo(json.dumps(_document(outcome, base, path), indent=2))
    else:
        _show(outcome, path)


def _forget(source: str | None, as_json: bool) -> None:
    from overflowml_core import session
    from overflowml_core.cli.screen import Screen
    from overflowml_core.tuned import forget_tuned

    count = forget_tuned(None if source is None else session.describe(source).fingerprint)
    if as_json:
        typer.echo(json.dumps({"removed": count}))
    else:
        Screen().text(f"removed {count} tuned plan{'' if count == 1 else 's'}")


def _show_untuned(base: Plan, as_json: bool) -> None:
    from overflowml_core.cli.screen import Screen

    if as_json:
        typer.echo(json.dumps({"network": base.network, "strategy": base.strategy, "tried": [], "kept": None, "file": None}, indent=2))
    else:
        Screen().paragraph(f"{base.network} fits as it is ({base.strategy}); there is nothing to tune. A smaller --budget would stream it.")


def _document(outcome: Outcome, base: Plan, path: Path) -> dict[str, Any]:
    tuned = outcome.tuned
    return {
        "network": base.network,
        "strategy": tuned.plan.strategy,
        "pass": tuned.pass_name,
        "tried": [asdict(one) for one in tuned.tried],
        "kept": tuned.kept,
        "plan_fingerprint": tuned.plan.fingerprint,
        "file": str(path),
        "corrected": None if outcome.corrected is None else str(outcome.corrected),
    }


def _show(outcome: Outcome, path: Path) -> None:
    from overflowml_core.cli.screen import Column, Screen
    from overflowml_core.cli.words import seconds_words

    screen, tuned = Screen(), outcome.tuned
    screen.heading(f"Plans that were run, seconds of a pass ({tuned.pass_name})")
    columns = [Column("Strategy", style="bold"), Column("What is where"), Column("Predicted", True), Column("Measured", True)]
    rows = [[one.strategy, one.what, seconds_words(one.predicted_pass_s), seconds_words(one.measured_pass_s)] for one in tuned.tried]
    screen.table(columns, rows, ["<- kept" if place == tuned.kept else "" for place in range(len(rows))])
    screen.paragraph(f"Kept in {path}; loads with the same limits use it from now on.")
    if outcome.corrected is not None:
        screen.paragraph(f"The calibration was corrected by what was measured: {outcome.corrected}.")
