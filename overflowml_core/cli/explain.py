"""``overflowml explain``: why a plan is as it is, why not otherwise, and what another machine would buy. Reads the plan alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overflowml_core.cli.options import JsonOption
from overflowml_core.errors import BadPlan

if TYPE_CHECKING:
    from overflowml_core.cli.screen import Screen
    from overflowml_core.plan import Plan, WhatIf

_LARGEST_FILE_BYTES = 64 * 2**20
"""No plan is longer; a file that is none may be."""


def explain(
    file: Annotated[str, typer.Argument(metavar="PLAN.json", help="A plan as 'plan --save' writes it; - reads standard input.")],
    as_json: JsonOption = False,
) -> None:
    """Say why this plan, why not the others, and what a larger card, more RAM or a faster link would buy."""
    from overflowml_core.plan import Plan

    plan = Plan.from_json(_read(file))
    if as_json:
        typer.echo(json.dumps(explanation(plan), indent=2))
        return
    from overflowml_core.cli.screen import Screen

    show_explanation(Screen(), plan)


def _read(file: str) -> bytes:
    try:
        with sys.stdin.buffer if file == "-" else Path(file).open("rb") as stream:
            data = stream.read(_LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        problem = getattr(error, "strerror", None) or str(error)
        raise BadPlan(f"{file}: cannot be read ({problem}); write a plan with 'overflowml plan SOURCE --save FILE'") from None
    return data


def explanation(plan: Plan) -> dict[str, Any]:
    """The explanation as a JSON object."""
    from overflowml_core.cli.alternatives import alternatives, refused

    document = json.loads(plan.to_json(indent=None))
    told = ("strategy", "speed", "quality", "chosen", "carried_out", "reason")
    return {
        "fingerprint": plan.fingerprint,
        "strategy": plan.strategy,
        "quality": plan.quality,
        "estimate": document["estimate"],
        "reasons": list(plan.reasons),
        "viable": [{name: getattr(way, name) for name in told} for way in alternatives(plan)],
        "rejected": [{"strategy": r.strategy, "reason": r.reason} for r in refused(plan)],
        "traps": document["traps"],
        "outlook": document["outlook"],
    }


def show_explanation(screen: Screen, plan: Plan) -> None:
    """Print the explanation."""
    from overflowml_core.cli.alternatives import alternatives
    from overflowml_core.cli.tables import model_words, show_alternatives, show_refused, show_traps
    from overflowml_core.cli.words import strategy_words
    from overflowml_core.units import format_bytes

    screen.paragraph(f"Plan {plan.fingerprint}: {model_words(plan, '')}", hanging="  ", style="bold")
    budget = f"{format_bytes(plan.estimate.device_peak_bytes)} of {format_bytes(plan.budget.device_bytes)}"
    screen.paragraph(f"{plan.strategy} on {plan.device_name} ({plan.device}), {budget}", "  ", "  ")
    screen.text()
    show_alternatives(screen, plan)
    screen.heading(f"Why {plan.strategy}")
    told = strategy_words(plan.strategy)
    for reason in (*((told,) if told else ()), *plan.reasons):
        screen.paragraph(reason, "  ", "  ")
    screen.text()
    others = [way for way in alternatives(plan) if not way.chosen]
    if others:
        screen.heading("Why not the others")
        for way in others:
            screen.paragraph(f"{way.strategy}: {way.reason}", "  ", "  ")
        screen.text()
    show_refused(screen, plan)
    if plan.traps:
        show_traps(screen, plan)
        screen.text()
    _show_outlook(screen, plan)


def _show_outlook(screen: Screen, plan: Plan) -> None:
    from overflowml_core.cli.screen import Column
    from overflowml_core.cli.words import seconds_words
    from overflowml_core.units import format_bytes

    screen.heading("What another machine would buy")
    if not plan.outlook:
        nothing = "Nothing: a larger card, more RAM or a faster link would change neither strategy nor time"
        screen.paragraph(f"{nothing} (or the plan was made in Python, where nobody asked).", "  ", "  ")
        return
    columns = (Column("With"), Column("Strategy", style="bold"), Column("VRAM", figures=True), Column("Time", figures=True), Column("Gain"))
    rows = [
        (what.change, what.strategy, format_bytes(what.device_bytes), seconds_words(what.total_s), gain_words(plan, what))
        for what in plan.outlook
    ]
    screen.table(columns, rows, indent="  ")


def gain_words(plan: Plan, what: WhatIf) -> str:
    """How much faster it would be; within 3 % is no difference. Empty where a time is unknown."""
    now_s, then_s = plan.estimate.total_s, what.total_s
    if now_s is None or then_s is None or now_s <= 0 or then_s <= 0:
        return ""
    ratio = now_s / then_s
    if 1 / 1.03 <= ratio <= 1.03:
        return "none"
    return f"{ratio:.2f} x as fast" if ratio > 1 else f"{1 / ratio:.2f} x as slow"
