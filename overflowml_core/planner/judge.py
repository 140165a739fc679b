"""Compares candidates: which one is chosen, and what is said of the others. Works none out."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from overflowml_core.facts import Limits, Tier
from overflowml_core.formats import AS_STORED
from overflowml_core.plan import Rejected
from overflowml_core.planner.candidates import MISSING, QUALITY_ORDER, Candidate
from overflowml_core.units import format_bytes, format_seconds

NEARLY = 1.03
"""A candidate that leaves the result as it is wins where it takes no more than this many times as long as the best."""


TIED = 1 + 1e-6
"""Times that differ by less are equal: what is between them is rounding. Of equals the simplest wins."""


def exclude(candidate: Candidate, limits: Limits) -> None:
    """Mark a candidate that uses what may not be used as not viable."""
    if not candidate.viable:
        return
    barred = limits.excluded
    for name in (candidate.kind, candidate.strategy):
        if ("strategy", name) in barred:
            candidate.reason = f"excluded: strategy {name}"
    for name in candidate.variants:
        if ("variant", name) in barred:
            candidate.reason = f"excluded: variant {name}"
    if (AS_STORED, "*") in barred and candidate.recipe.format is None:
        candidate.reason = "excluded: weights as they are stored"
    for form, tier in sorted(_used(candidate)) if barred else ():
        if barred & {(form, tier), (form, "*")}:
            candidate.reason = f"excluded: {form} in {tier}"


def _used(candidate: Candidate) -> set[tuple[str, str]]:
    used = set()
    for draft, phase in zip(candidate.drafts, candidate.homes, strict=True):
        for place, (weight, home, stays) in enumerate(zip(draft.need.weights, phase.blocks, draft.residency.resident, strict=True)):
            if weight.format:
                used |= {(weight.format, home.value), (weight.format, Tier.DEVICE.value if stays else home.value)}
                experts = phase.experts[place] if phase.experts else None
                if experts is not None:
                    used.add((weight.format, experts.value))
    return used


def carried_out(candidate: Candidate, abilities: frozenset[str]) -> bool:
    """Whether what it needs can be carried out."""
    return candidate.requires <= abilities


def permitted(candidate: Candidate, limits: Limits) -> bool:
    """Whether its loss is granted. Where nobody said what may be lost, it is what the formats of 8 bits lose."""
    return QUALITY_ORDER.index(candidate.quality) <= QUALITY_ORDER.index(limits.quality or "minimal")


def best_of(candidates: Sequence[Candidate], limits: Limits, abilities: frozenset[str]) -> Candidate | None:
    """The candidate to carry out.

    The fastest of those that run within the limits, can be carried out and are permitted. Without times it is the one that moves the
    fewest bytes. Where one that leaves the result as it is takes no more than 3 % longer it wins, then one of minimal loss. Of equals the
    first wins, and candidates come with the simplest first. Where rates are assumed, whatever is within 3 % counts as equal, and nobody
    leaves memory unused for a time that was never measured: every block is streamed only where nothing else runs.
    """
    able = [c for c in candidates if c.viable and permitted(c, limits) and carried_out(c, abilities)]
    if able and able[0].setting.rates.source == "assumed":
        fuller = {c.recipe.format for c in able if c.kind in ("direct", "phased", "stream")}
        able = [c for c in able if c.kind != "sequential" or c.recipe.format not in fuller]
    if not able:
        return None
    costs = comparable(able)
    least = min(costs)
    near = [(c, cost) for c, cost in zip(able, costs, strict=True) if cost <= least * NEARLY]
    gentlest = min(QUALITY_ORDER.index(c.quality) for c, _ in near)
    equals = [(c, cost) for c, cost in near if QUALITY_ORDER.index(c.quality) == gentlest]
    tied = NEARLY if able[0].setting.rates.source == "assumed" else TIED
    fastest = min(cost for _, cost in equals)
    return next(c for c, cost in equals if cost <= fastest * tied)


def comparable(candidates: Sequence[Candidate]) -> list[float]:
    """What to compare candidates by: seconds where they are known of any, else bytes moved; infinite where it is not known."""
    seconds = [c.score_s for c in candidates]
    if any(s is not None for s in seconds):
        return [inf if s is None else s for s in seconds]
    # That the CPU moves nothing says nothing of how slow it is.
    return [inf if c.kind == "cpu" else float(c.moved_bytes) for c in candidates]


def one_of_each(candidates: Sequence[Candidate], abilities: frozenset[str]) -> list[Candidate]:
    """The best of the candidates of each name: a format may be for all components, or only for those of the heaviest phase."""
    named: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        named.setdefault(_name(candidate, abilities), []).append(candidate)
    kept = []
    for group in named.values():
        viable = [c for c in group if c.viable]
        costs = comparable(viable)
        kept.append(viable[costs.index(min(costs))] if viable else group[0])
    return kept


def _name(candidate: Candidate, abilities: frozenset[str]) -> str:
    variants = () if "variants" in abilities else candidate.variants
    return " ".join((candidate.strategy, *variants))


def rejections(candidates: Sequence[Candidate], chosen: Candidate, limits: Limits, abilities: frozenset[str]) -> list[Rejected]:
    """What is said of every candidate that was not chosen."""
    return [
        Rejected(
            strategy=_name(candidate, abilities),
            reason=_why_not(candidate, chosen, limits, abilities),
            estimate=candidate.estimate,
            viable=candidate.viable,
            quality=candidate.quality,
            carried_out=carried_out(candidate, abilities),
        )
        for candidate in candidates
        if candidate is not chosen
    ]


def _why_not(candidate: Candidate, chosen: Candidate, limits: Limits, abilities: frozenset[str]) -> str:
    if not candidate.viable:
        return candidate.reason
    compared = _compared(candidate, chosen)
    missing = candidate.recipe.format.missing if candidate.recipe.format is not None and MISSING not in abilities else ""
    if missing:
        return f"{missing}; {compared}"
    if not permitted(candidate, limits):
        return f"changes the result more than quality='{limits.quality}' permits, quality='{candidate.quality}' would; {compared}"
    if not carried_out(candidate, abilities):
        return f"this version does not carry it out yet; {compared}"
    if chosen.quality != candidate.quality and compared.endswith("faster"):
        return f"{compared}, and not {chosen.quality}"
    return compared


def _compared(candidate: Candidate, chosen: Candidate) -> str:
    own_s, best_s = candidate.score_s, chosen.score_s
    if candidate.kind == "cpu" and own_s is None:
        return "nobody knows how fast this CPU computes"
    if own_s is None or best_s is None:
        return f"moves {format_bytes(candidate.moved_bytes)}, {chosen.strategy} {format_bytes(chosen.moved_bytes)}"
    told = f"{format_seconds(own_s)} in all"
    if best_s <= 0 or abs(own_s - best_s) <= 5e-4 * best_s:
        return f"{told}, as long as {chosen.strategy}"
    if own_s > best_s:
        return f"{told}, {own_s / best_s:.2f} times as long as {chosen.strategy}"
    return f"{told}, {100 * (1 - own_s / best_s):.1f} % faster"
