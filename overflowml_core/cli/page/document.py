"""Puts the page together: the answer first, then what it rests on. Reads a plan, its timeline and its machine; decides nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from overflowml_core.cli.alternatives import NOT_CARRIED_OUT, alternatives, carried_out, refused
from overflowml_core.cli.explain import gain_words
from overflowml_core.cli.machine_tables import rate_lines
from overflowml_core.cli.page.charts import timeline_chart
from overflowml_core.cli.page.holdings import holdings
from overflowml_core.cli.page.markup import Markup, element, joined
from overflowml_core.cli.tables import model_words
from overflowml_core.cli.words import (
    RISKS,
    hardware_words,
    memory_heading,
    seconds_words,
    strategy_words,
    token_words,
    vram_words,
    work_words,
)
from overflowml_core.machine import Machine
from overflowml_core.plan import Plan
from overflowml_core.units import format_bytes

if TYPE_CHECKING:
    from overflowml_core.planner.timeline import Timeline

_BOUND = {"compute": "arithmetic", "memory": "the device's memory", "link": "copies to the device", "disk": "reads from disk"}


def page_of(plan: Plan, timeline: Timeline, machine: Machine, source: str) -> str:
    """The page as HTML.

    Args:
        plan: what is shown.
        timeline: the plan as it will run.
        machine: what it will run on.
        source: what people call the model.
    """
    sections = (
        _section("What the device holds", holdings(plan)),
        _section("Memory and time", _times(timeline, plan)),
        _section("Strategies that would run", _alternatives(plan)),
        _section("Rejected", _refused(plan)),
        _section("Reasons", _listed(plan.reasons)),
        _section("Known traps handled", _traps(plan)),
        _section("What another machine would buy", _outlook(plan)),
        _section("Rates", _rates(plan)),
    )
    body = joined(_header(plan, machine, source), element("main", *sections), _footer(plan), element("script", Markup(_own("page.js"))))
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("title", f"Plan for {plan.network}: {plan.strategy}"),
        element("style", Markup(_own("page.css"))),
    )
    return f"<!DOCTYPE html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy() -> str:
    # Nothing is fetched, and no script runs but ours, whatever a name in a file may hold.
    script = base64.b64encode(hashlib.sha256(_own("page.js").encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"


def _section(title: str, content: Markup) -> Markup:
    return element("section", element("h2", title), content) if content else Markup("")


def _header(plan: Plan, machine: Machine, source: str) -> Markup:
    estimate, budget = plan.estimate, plan.budget.device_bytes
    told = strategy_words(plan.strategy)
    runs = carried_out(plan.strategy)
    verdict = [element("strong", "It runs: " if runs else "It would run: "), element("b", plan.strategy), f", {told}." if told else "."]
    if not runs:
        verdict.append(element("span", f" {NOT_CARRIED_OUT}", class_="warn"))
    tiles = [
        ("peak of the device", format_bytes(estimate.device_peak_bytes), f"of {format_bytes(budget)}"),
        ("a unit of work", seconds_words(estimate.total_s), work_words(plan)),
        ("answers", token_words(estimate, plan.workload.batch), _first_token(plan)),
        ("a pass", "" if estimate.pass_s is None else seconds_words(estimate.pass_s), _bound(plan)),
        ("quality risk", RISKS.get(plan.quality, plan.quality), ", ".join(plan.formats) or "weights as stored"),
        ("outside the device", *_outside(plan)),
    ]
    figures = [
        element("div", element("dt", name), element("dd", value), element("dd", note, class_="note") if note else "")
        for name, value, note in tiles
        if value
    ]
    return element(
        "header",
        element("h1", model_words(plan, source)),
        element("p", hardware_words(machine), class_="dim"),
        element("p", *verdict, class_="verdict"),
        element("dl", *figures, class_="tiles"),
    )


def _first_token(plan: Plan) -> str:
    first_s = plan.estimate.first_token_s
    return "" if first_s is None else f"first token after {seconds_words(first_s)}"


def _bound(plan: Plan) -> str:
    estimate = plan.estimate
    parts = []
    if estimate.bound_by:
        parts.append(f"bound by {_BOUND.get(estimate.bound_by, estimate.bound_by)}")
    if estimate.stall_s:
        parts.append(f"{seconds_words(estimate.stall_s)} waiting")
    return ", ".join(parts)


def _outside(plan: Plan) -> tuple[str, str]:
    estimate = plan.estimate
    parts = {"pinned RAM": estimate.pinned_bytes, "pageable RAM": estimate.ram_bytes, "disk": estimate.disk_bytes}
    where = [f"{format_bytes(nbytes)} {name}" for name, nbytes in parts.items() if nbytes]
    return format_bytes(sum(parts.values())), ", ".join(where)


def _times(timeline: Timeline, plan: Plan) -> Markup:
    notes = [f"Nobody knows the times of {', '.join(timeline.unknown)}; they are not drawn."] if timeline.unknown else []
    if any(section.more for section in timeline.sections):
        shown = max(section.shown for section in timeline.sections)
        notes.append(f"Of passes that repeat {shown} are drawn; the axis counts what is drawn, {seconds_words(timeline.drawn_s)}.")
    return joined(timeline_chart(timeline, plan), *(element("p", note, class_="dim") for note in notes))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], figures: frozenset[str], classes: Sequence[str] = ()) -> Markup:
    marks = {heading: "figure" if heading in figures else None for heading in headings}
    head = element("tr", *(element("th", heading, class_=marks[heading], scope="col") for heading in headings))
    body = []
    for i, row in enumerate(rows):
        cells = [element("td", cell, class_=marks[heading], data_heading=heading) for heading, cell in zip(headings, row, strict=True)]
        body.append(element("tr", *cells, class_=(classes[i] or None) if classes else None))
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="table")


def _alternatives(plan: Plan) -> Markup:
    ways = alternatives(plan)
    batch = plan.workload.batch
    answers = any(token_words(way.estimate, batch) for way in ways)
    memory = memory_heading(plan)
    headings = ("Speed", "Strategy", memory, "Quality risk", "Time", *(("Answers",) if answers else ()), "Why not")
    rows = []
    for way in ways:
        vram = vram_words(way.strategy, way.estimate)
        total = seconds_words(None if way.estimate is None else way.estimate.total_s)
        tokens = (token_words(way.estimate, batch),) if answers else ()
        why = " ".join(filter(None, ("recommended" if way.chosen else way.reason, "" if way.carried_out else NOT_CARRIED_OUT)))
        rows.append((way.speed, way.strategy, vram, RISKS.get(way.quality, way.quality), total, *tokens, why))
    source = "" if plan.rates is None else f", predicted with {plan.rates.source} rates"
    note = element("p", f"Time is for one unit of work: {work_words(plan)}{source}.", class_="dim") if work_words(plan) else ""
    marks = ["chosen" if way.chosen else "" for way in ways]
    return joined(_table(headings, rows, frozenset({memory, "Time", "Answers"}), marks), note)


def _refused(plan: Plan) -> Markup:
    rows = [(row.strategy, row.reason) for row in refused(plan)]
    return _table(("Strategy", "Why"), rows, frozenset()) if rows else Markup("")


def _listed(lines: Iterable[str]) -> Markup:
    items = [element("li", line) for line in lines]
    return element("ul", *items) if items else Markup("")


def _traps(plan: Plan) -> Markup:
    items = [element("li", element("b", trap.trap), f": {trap.reason}", f"; {trap.remedy}" if trap.remedy else "") for trap in plan.traps]
    return element("ul", *items) if items else Markup("")


def _outlook(plan: Plan) -> Markup:
    rows = [
        (what.change, what.strategy, format_bytes(what.device_bytes), seconds_words(what.total_s), gain_words(plan, what))
        for what in plan.outlook
    ]
    return _table(("With", "Strategy", "VRAM", "Time", "Gain"), rows, frozenset({"VRAM", "Time"})) if rows else Markup("")


def _rates(plan: Plan) -> Markup:
    if plan.rates is None:
        return Markup("")
    return joined(element("p", f"Source: {plan.rates.source}."), _listed(rate_lines(plan.rates)))


def _footer(plan: Plan) -> Markup:
    from overflowml._version import __version__

    return element("footer", f"plan {plan.fingerprint}, schema {plan.schema}, overflowml {__version__}")
