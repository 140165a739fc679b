"""Draws what the device holds in each phase, and where each block lives. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from overflowml_core.cli.page.markup import Markup, element, joined
from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan, Placement, Plan
from overflowml_core.units import format_bytes

_TIERS = {
    Tier.DEVICE: "resident",
    Tier.PINNED: "streamed from pinned RAM",
    Tier.RAM: "streamed from pageable RAM",
    Tier.DISK: "streamed from disk",
}
_PARTS = {
    "fixed": "weights outside blocks",
    "resident": "resident blocks",
    "slots": "staging slots",
    "experts": "cached experts",
    "activations": "activations",
}
_GAP = 0.0015
"""Between two blocks, as a part of the strip's width."""
_MOST_BLOCKS = 400
"""Blocks that are drawn one by one; of more, neighbours that live alike are drawn as one."""


def holdings(plan: Plan) -> Markup:
    """For each phase: a bar of what the device holds against the budget, and a strip of its blocks."""
    top = max([plan.budget.device_bytes, *(phase.device_bytes for phase in plan.phases), 1])
    return joined(*(_phase(phase, plan, top) for phase in plan.phases), _legend(plan))


def _phase(phase: PhasePlan, plan: Plan, top: int) -> Markup:
    name = phase.name if phase.components == (phase.name,) else f"{phase.name} ({', '.join(phase.components)})"
    variant = f", {phase.variant} switched on" if phase.variant else ""
    activations = phase.activation_bytes * len(phase.devices)
    others = (phase.fixed_bytes, phase.resident_bytes, phase.expert_cache_bytes, activations)
    parts = {
        "fixed": phase.fixed_bytes,
        "resident": phase.resident_bytes,
        "slots": phase.device_bytes - sum(others),  # on every device that streams
        "experts": phase.expert_cache_bytes,
        "activations": activations,
    }
    pieces = [
        element("span", class_=part, style=f"width:{100 * nbytes / top:.4f}%", title=f"{_PARTS[part]}: {format_bytes(nbytes)}")
        for part, nbytes in parts.items()
        if nbytes
    ]
    line = element("span", class_="limit", style=f"left:{100 * plan.budget.device_bytes / top:.4f}%")
    told = ", ".join(f"{_PARTS[part]} {format_bytes(nbytes)}" for part, nbytes in parts.items() if nbytes)
    return element(
        "section",
        element("h3", f"{name}: {format_bytes(phase.device_bytes)}{variant}"),
        element("div", *pieces, line, class_="bar", role="img", aria_label=told),
        element("p", told, class_="dim"),
        *_strips(phase, plan),
    )


def _strips(phase: PhasePlan, plan: Plan) -> list[Markup]:
    found = []
    names = plan.devices or (plan.device,)
    for component in phase.components:
        own = [p for p in phase.placements if p.component == component]
        for device in sorted({p.device for p in own}):
            blocks = [p for p in own if p.device == device]
            where = f" on {names[device]}" if len(names) > 1 and device < len(names) else ""
            found.append(_strip(f"{component}{where}: {_counts(blocks)}", blocks, lambda p: p.tier, _block_words))
            experts = [p for p in blocks if p.experts_home is not None]
            if experts:
                found.append(_strip(f"{component}{where}: experts of {len(experts)} blocks", experts, _experts_tier, _experts_words))
    return found


def _counts(blocks: Sequence[Placement]) -> str:
    counts = {tier: sum(p.tier is tier for p in blocks) for tier in _TIERS}
    nbytes = {tier: sum(p.stored_bytes for p in blocks if p.tier is tier) for tier in _TIERS}
    named = {tier: "1 block" if count == 1 else f"{count} blocks" for tier, count in counts.items() if count}
    return ", ".join(f"{words} {_TIERS[tier]} ({format_bytes(nbytes[tier])})" for tier, words in named.items())


def _experts_tier(placement: Placement) -> Tier:
    return placement.experts_home or Tier.DEVICE


def _block_words(first: Placement, last: Placement) -> str:
    form = f", {first.format}" if first.format else ""
    home = "" if first.home is first.tier else f", waits in {first.home.value} between its phases"
    blocks = first.block if first is last else f"{first.block} to {last.block}"
    return f"{blocks}: {_TIERS[first.tier]}, {format_bytes(first.stored_bytes)}{form}{home}"


def _experts_words(first: Placement, last: Placement) -> str:
    return f"experts of {first.block if first is last else f'{first.block} to {last.block}'}: wait in {_experts_tier(first).value}"


def _strip(
    name: str, placements: Sequence[Placement], tier: Callable[[Placement], Tier], words: Callable[[Placement, Placement], str]
) -> Markup:
    shapes, place = [], 0
    alike = (lambda pair: pair[0]) if len(placements) <= _MOST_BLOCKS else (lambda pair: (tier(pair[1]), pair[1].format))
    gap = min(_GAP * len(placements), 0.2)
    for _, group in groupby(enumerate(placements), key=alike):
        run = [placement for _, placement in group]
        title = element("title", words(run[0], run[-1]))
        shapes.append(element("rect", title, x=place, y=0, width=len(run) - gap, height=1, class_=f"t-{tier(run[0]).value}"))
        place += len(run)
    drawing = element("svg", *shapes, viewBox=f"0 0 {max(place, 1)} 1", preserveAspectRatio="none", role="img", aria_label=name)
    return element("figure", element("figcaption", name), drawing, class_="strip")


def _legend(plan: Plan) -> Markup:
    tiers = {p.tier for p in plan.placements()} | {_experts_tier(p) for p in plan.placements() if p.experts_home is not None}
    marks = [joined(element("i", class_=f"t-{tier.value}"), words) for tier, words in _TIERS.items() if tier in tiers]
    used = {
        "fixed": any(phase.fixed_bytes for phase in plan.phases),
        "slots": any(phase.slot_count for phase in plan.phases),
        "experts": any(phase.expert_cache_bytes for phase in plan.phases),
        "activations": any(phase.activation_bytes for phase in plan.phases),
    }
    marks += [joined(element("i", class_=part), _PARTS[part]) for part, shown in used.items() if shown]
    return element("p", *(element("span", mark) for mark in marks), class_="legend")
