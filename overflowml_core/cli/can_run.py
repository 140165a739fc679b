"""``overflowml can-run``: one word, one line why, and an exit status for scripts: 0 yes, 1 no, 2 unknown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import typer

from overflowml_core.cli import ending
from overflowml_core.cli.options import JsonOption, Request, takes_request
from overflowml_core.errors import DoesNotFit

if TYPE_CHECKING:
    from overflowml_core.cli.question import Question
    from overflowml_core.plan import Plan

_STATUS = {"yes": ending.YES, "no": ending.NO, "unknown": ending.WRONG_INPUT}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model runs.

    Attributes:
        answer: "yes", "no" or "unknown".
        why: one line, with numbers.
        plan: how, where there is one.
    """

    answer: str
    why: str
    plan: Plan | None = None

    @property
    def status(self) -> int:
        """The exit status that says the same."""
        return _STATUS[self.answer]


@takes_request
def can_run(request: Request, as_json: JsonOption = False) -> None:
    """Say whether a model runs here, or on another machine: exit status 0 yes, 1 no, 2 unknown or wrong input."""
    from overflowml_core.cli.question import question_of

    verdict = verdict_of(question_of(request))
    if as_json:
        typer.echo(json.dumps(_document(verdict), indent=2))
    else:
        from overflowml_core.cli.screen import Screen

        Screen().text(f"{verdict.answer}: {verdict.why}")
    raise typer.Exit(verdict.status)


def verdict_of(question: Question) -> Verdict:
    """Plan with what this version carries out, and say what came of it."""
    lacking = _no_room_on_disk(question)
    if lacking:
        return Verdict("no", lacking)
    try:
        plan = replace(question, forecast=False).plan()
    except DoesNotFit as error:
        return Verdict("no", ending.in_options(str(error)) + _would_run(question))
    unknown = question.unknown_activations
    if unknown:
        return Verdict(
            "unknown", f"the weights fit as {plan.strategy}, but nobody knows the activations of {', '.join(unknown)}; give --reserve", plan
        )
    return Verdict("yes", _how(plan), plan)


def _no_room_on_disk(question: Question) -> str:
    """Why the weights cannot even be stored; empty where they can, or are there already."""
    from overflowml_core.units import format_bytes

    weights, free = question.network.weight_bytes, question.machine.disk_free_bytes
    if question.local or question.machine.named or weights <= free:
        return ""
    where = "make room, or set OVERFLOWML_CACHE to another disk"
    return f"the weights take {format_bytes(weights)} and the disk has {format_bytes(free)} free; {where}"


def _would_run(question: Question) -> str:
    """What would run with more than this version carries out, as the end of a sentence."""
    try:
        plan = question.plan()
    except DoesNotFit:
        return ""
    return f"; it would run as {plan.strategy}, which this version does not carry out yet"


def _how(plan: Plan) -> str:
    from overflowml_core.cli.words import seconds_words, token_words
    from overflowml_core.units import format_bytes

    estimate = plan.estimate
    parts = [
        f"{plan.strategy} on {plan.device_name}",
        f"{format_bytes(estimate.device_peak_bytes)} of {format_bytes(plan.budget.device_bytes)}",
        "" if estimate.total_s is None else f"{seconds_words(estimate.total_s)} a unit of work",
        token_words(estimate, plan.workload.batch),
    ]
    if plan.quality != "lossless":
        parts.append(f"quality {plan.quality}")
    return ", ".join(filter(None, parts))


def _document(verdict: Verdict) -> dict[str, object]:
    plan = verdict.plan
    return {
        "answer": verdict.answer,
        "exit_code": verdict.status,
        "why": verdict.why,
        "strategy": None if plan is None else plan.strategy,
        "quality": None if plan is None else plan.quality,
        "device_peak_bytes": None if plan is None else plan.estimate.device_peak_bytes,
        "device_budget_bytes": None if plan is None else plan.budget.device_bytes,
        "total_s": None if plan is None else plan.estimate.total_s,
        "token_s": None if plan is None else plan.estimate.token_s,
    }
