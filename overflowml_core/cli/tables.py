"""Prints a plan and its alternatives: tables first, then the reasons. Reads the plan and decides nothing."""

from __future__ import annotations

from overflowml_core.cli.alternatives import Alternative, alternatives, refused
from overflowml_core.cli.screen import Column, Screen
from overflowml_core.cli.words import (
    RISKS,
    hardware_words,
    memory_heading,
    seconds_words,
    strategy_words,
    token_words,
    vram_words,
    work_words,
    workload_words,
)
from overflowml_core.machine import Machine
from overflowml_core.plan import Plan
from overflowml_core.units import format_bytes


def show_comparison(screen: Screen, plan: Plan, machine: Machine, source: str) -> None:
    """Print what would run and what would not, and why: the answer of ``plan --compare``."""
    screen.paragraph(f"Hardware: {hardware_words(machine)}", hanging="  ")
    screen.paragraph(f"Model: {model_words(plan, source)}", hanging="  ")
    screen.text()
    show_alternatives(screen, plan)
    show_refused(screen, plan)
    show_reasons(screen, plan)


def model_words(plan: Plan, source: str) -> str:
    """What is planned for."""
    asked = workload_words(plan.workload)
    known = plan.network if source in ("", plan.network) else f"{source} ({plan.network})"
    weights = f"{format_bytes(plan.weight_bytes)} of weights"
    return ", ".join(filter(None, (known, "" if source == weights else weights, asked)))  # a bare size has no other name


def show_alternatives(screen: Screen, plan: Plan) -> None:
    """Print the table of all that would run."""
    screen.heading("Viable strategies")
    ways = alternatives(plan)
    batch = plan.workload.batch
    answers = any(token_words(way.estimate, batch) for way in ways)
    columns = [
        Column("#", figures=True),
        Column("Speed"),
        Column("Strategy", style="bold"),
        Column(memory_heading(plan), figures=True),
        Column("Quality risk"),
        Column("Time", figures=True),
    ]
    columns += [Column("Answers", figures=True)] if answers else []
    rows = [(*_cells(i, way), *((token_words(way.estimate, batch),) if answers else ())) for i, way in enumerate(ways, 1)]
    screen.table(columns, rows, [way.mark for way in ways])
    work = work_words(plan)
    source = "" if plan.rates is None else f", predicted with {plan.rates.source} rates"
    if work and any(way.estimate is not None and way.estimate.total_s is not None for way in ways):
        screen.paragraph(f"Time is for one unit of work: {work}{source}.", style="dim")
    screen.text()


def _cells(number: int, way: Alternative) -> tuple[str, ...]:
    estimate = way.estimate
    vram = vram_words(way.strategy, estimate)
    total = seconds_words(None if estimate is None else estimate.total_s)
    return (str(number), way.speed, way.strategy, vram, RISKS.get(way.quality, way.quality), total)


def show_refused(screen: Screen, plan: Plan) -> None:
    """Print what would not run, each with its reason."""
    rows = refused(plan)
    if rows:
        screen.text("Rejected:", "bold")
        for row in rows:
            screen.paragraph(f"{row.strategy}: {row.reason}", "  ", "  ")
        screen.text()


def show_reasons(screen: Screen, plan: Plan) -> None:
    """Print why the plan is as it is, and which known traps it steered around."""
    screen.heading("Reasoning")
    told = strategy_words(plan.strategy)
    for reason in (*((f"{plan.strategy}: {told}",) if told else ()), *plan.reasons):
        screen.paragraph(reason, "  ", "  ")
    show_traps(screen, plan)


def show_traps(screen: Screen, plan: Plan) -> None:
    """Print the known traps that the plan steered around."""
    if plan.traps:
        screen.text("  Known traps handled:")
        for trap in plan.traps:
            remedy = f"; {trap.remedy}" if trap.remedy else ""
            screen.paragraph(f"- {trap.trap}: {trap.reason}{remedy}", "    ", "  ")
