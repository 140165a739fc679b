"""A plan in plain text, for a person at a terminal. Reads the plan alone and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

from overflowml_core.activations import ASSUMED_TOKENS
from overflowml_core.facts import Tier, Workload
from overflowml_core.plan import PassEstimate, PhasePlan, Placement, Plan
from overflowml_core.units import format_bytes, format_seconds

_WIDTH = 100
_STRIP_WIDTH = 60
_NAME_WIDTH = 22
_RESIDENT, _STREAMED, _BOTH = "■", "□", "▣"
_HEADINGS = ("phase", "weights", "resident", "streamed", "staging", "activations", "peak", "waits in")
_TIER_WORDS = {Tier.PINNED: "pinned", Tier.RAM: "RAM", Tier.DISK: "disk"}
_BOUND_WORDS = {"link": "copies to the device", "disk": "reads from disk", "memory": "the device's memory", "compute": "arithmetic"}
_STRATEGY_WORDS = {
    "direct": "everything stays on the device; nothing is streamed",
    "phased": "the phases take turns on the device; nothing is streamed within one",
    "stream": "blocks that do not fit are streamed to the device just before they are needed",
    "sequential": "every block is streamed to the device just before it is needed; the least memory",
    "experts": "the dense part stays on the device with a cache of experts; the others wait outside",
    "devices": "consecutive blocks on several devices, each of which streams what does not fit on it",
    "cpu": "everything in RAM, computed by the CPU",
}


def summarize(plan: Plan) -> str:
    """The plan as text of about 100 columns: header, table of phases, residency strips, prediction, traps, rejections, reasons, outlook."""
    sections = [_header(plan), _table(plan), _strips(plan), _prediction(plan)]
    if plan.traps:
        sections.append(["steered around:", *_listed(f"{t.trap}: {t.reason}" + (f"; {t.remedy}" if t.remedy else "") for t in plan.traps)])
    if plan.rejected:
        sections.append(["not chosen:", *_listed(f"{r.strategy}: {r.reason}" for r in plan.rejected)])
    if plan.reasons:
        sections.append(["reasons:", *_listed(plan.reasons)])
    if plan.outlook:
        sections.append(["with another machine:", *_listed(_outlook(plan))])
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _header(plan: Plan) -> list[str]:
    where = plan.device if plan.device_name.lower() == plan.device else f"{plan.device_name} ({plan.device})"
    words = _STRATEGY_WORDS.get(plan.kind)
    facts = f"{format_bytes(plan.weight_bytes)} of weights on {where}, budget {format_bytes(plan.budget.device_bytes)}"
    return [*_folded(f"{plan.network}: {facts}"), f"{plan.strategy}: {words}" if words else plan.strategy]


def _table(plan: Plan) -> list[str]:
    rows = [_HEADINGS, *(_row(phase) for phase in plan.phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    last = len(_HEADINGS) - 1
    return [
        "  ".join(c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in rows
    ]


def _row(phase: PhasePlan) -> tuple[str, ...]:
    streamed_bytes = _sum(phase.streamed)
    resident_bytes = phase.fixed_bytes + phase.resident_bytes
    return (
        _clipped(_phase_name(phase)),
        format_bytes(resident_bytes + streamed_bytes),
        format_bytes(resident_bytes),
        format_bytes(streamed_bytes) if phase.streamed else "-",
        format_bytes(phase.staging_bytes) if phase.staging_bytes else "-",
        format_bytes(phase.activation_bytes),
        format_bytes(phase.device_bytes),
        "+".join(word for tier, word in _TIER_WORDS.items() if tier in _homes(phase)) or "-",
    )


def _phase_name(phase: PhasePlan) -> str:
    name = phase.name if phase.components == (phase.name,) else f"{phase.name}: {', '.join(phase.components)}"
    return f"{name} ({phase.variant})" if phase.variant else name


def _clipped(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."


def _homes(phase: PhasePlan) -> set[Tier]:
    experts = {p.experts_home for p in phase.placements if p.experts_home is not None}
    return {phase.fixed_home, *(placement.home for placement in phase.placements), *experts}


def _sum(placements: Iterable[Placement]) -> int:
    return sum(placement.stored_bytes for placement in placements)


def _strips(plan: Plan) -> list[str]:
    rows = []
    for phase in plan.phases:
        if phase.streamed:
            rows += [(component, [p for p in phase.placements if p.component == component]) for component in phase.components]
    rows = [(name, placements) for name, placements in rows if placements]
    width = max((len(_clipped(name)) for name, _ in rows), default=0)
    lines = [f"{_clipped(name).ljust(width)}  {residency_strip(placements)}" for name, placements in rows]
    if lines:
        both = f", {_BOTH} some of each" if any(_BOTH in line for line in lines) else ""
        lines.append(f"{' ' * width}  ({_RESIDENT} resident, {_STREAMED} streamed{both})")
    return lines


def residency_strip(placements: Sequence[Placement]) -> str:
    """One mark per block in order of execution; with more than 60 blocks each mark stands for several."""
    per_mark = -(-len(placements) // _STRIP_WIDTH) or 1
    marks = ""
    for first in range(0, len(placements), per_mark):
        stays = {placement.tier is Tier.DEVICE for placement in placements[first : first + per_mark]}
        marks += _BOTH if len(stays) == 2 else _RESIDENT if True in stays else _STREAMED
    return marks if per_mark == 1 else f"{marks}  {per_mark} blocks a mark"


def _prediction(plan: Plan) -> list[str]:
    estimate = plan.estimate
    lines = [f"predicted peak: {format_bytes(estimate.device_peak_bytes)} of {format_bytes(plan.budget.device_bytes)} on {plan.device}"]
    lines += _times(plan)
    for phase in plan.phases:
        if phase.expert_cache_bytes:
            lines.append(f"cache of experts: {format_bytes(phase.expert_cache_bytes)} of the device")
            lines += _expert_passes(phase, plan.workload)
        if phase.streamed:
            moved = f"{format_bytes(phase.estimate.streamed_bytes)} streamed{_transfer(phase.estimate.transfer_s)}"
            lines.append(f"per pass of {_phase_name(phase)}: {moved}")
    outside = ((estimate.pinned_bytes, "pinned RAM"), (estimate.ram_bytes, "pageable RAM"), (estimate.disk_bytes, "disk"))
    parts = [f"{format_bytes(nbytes)} of {words}" for nbytes, words in outside if nbytes]
    if parts:
        lines.append(f"outside the device: {', '.join(parts)}")
    return [folded for line in lines for folded in _folded(line)]


def _expert_passes(phase: PhasePlan, workload: Workload) -> Iterable[str]:
    for one in phase.passes:
        if one.expert_hit_rate is None:
            continue
        found = f"{100 * one.expert_hit_rate:.0f} % of {format_bytes(one.expert_bytes)} of experts are in the cache"
        missed = f"{format_bytes(one.missed_expert_bytes)} are brought in"
        limit = f"; bound by {_BOUND_WORDS[one.bound_by]}" if one.bound_by in _BOUND_WORDS else ""
        yield f"per {one.name} of {one.component}: {found}, {missed}{limit}{_rate(one, workload)}"


def _rate(one: PassEstimate, workload: Workload) -> str:
    if not one.pass_s or one.name not in ("prefill", "token"):
        return ""
    tokens = workload.batch * ((workload.prompt_tokens or ASSUMED_TOKENS) if one.name == "prefill" else 1)
    assumed = f" (a prompt of {ASSUMED_TOKENS} assumed)" if one.name == "prefill" and not workload.prompt_tokens else ""
    return f"; {tokens / one.pass_s:.3g} tokens a second{assumed}"


def _times(plan: Plan) -> Iterable[str]:
    estimate = plan.estimate
    if estimate.total_s is not None:
        yield f"predicted time: {format_seconds(estimate.total_s)} for a unit of work"
    if estimate.token_s:
        first = "" if estimate.first_token_s is None else f"first token after {format_seconds(estimate.first_token_s)}, "
        yield f"{first}{plan.workload.batch / estimate.token_s:.3g} tokens a second"


def _outlook(plan: Plan) -> Iterable[str]:
    for answer in plan.outlook:
        time = "" if answer.total_s is None else f", {format_seconds(answer.total_s)}"
        yield f"{answer.change}: {answer.strategy}{time}, {format_bytes(answer.device_bytes)} of the device"


def _transfer(seconds: float | None) -> str:
    return "" if seconds is None else f", {format_seconds(seconds)} of transfer (rates: see reasons)"


def _listed(items: Iterable[str]) -> list[str]:
    return [line for item in items for line in wrap(item, _WIDTH, initial_indent="  - ", subsequent_indent="    ")]


def _folded(line: str) -> list[str]:
    return wrap(line, _WIDTH, subsequent_indent="  ", break_long_words=False)
