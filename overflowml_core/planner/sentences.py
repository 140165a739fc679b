"""Why a plan is as it is, in sentences that can be checked line by line. Reads a decision and makes none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from overflowml_core.facts import Tier
from overflowml_core.plan import PhasePlan
from overflowml_core.planner.candidates import Candidate
from overflowml_core.planner.expert_pace import slot_bytes
from overflowml_core.planner.homes import Draft
from overflowml_core.planner.setting import Setting
from overflowml_core.units import format_bytes, format_seconds

_SOURCES = {"traced": "traced on fake tensors", "analytic": "an analytic estimate", "measured": "measured"}
_BOUND_WORDS = {
    "compute": "arithmetic",
    "memory": "the device's own memory",
    "link": "copies to the device",
    "disk": "reads from disk",
}
_RATE_WORDS = {"measured": "measured rates", "datasheet": "datasheet rates"}


def sentences(chosen: Candidate, phases: Sequence[PhasePlan]) -> tuple[str, ...]:
    """What was decided, and how sure its numbers are.

    Args:
        chosen: the candidate that won.
        phases: the same, written down.
    """
    setting, drafts = chosen.setting, chosen.drafts
    # What the host could spare says nothing about a plan that leaves it alone.
    found = list(setting.budget_reasons[:1] if not chosen.takes_turns and _stays(phases) else setting.budget_reasons)
    found += _format_sentences(chosen)
    for draft, phase in zip(drafts, phases, strict=True):
        found += _residency_sentences(phase)
        found += _expert_sentences(draft, phase, setting)
        if phase.variant:
            found.append(
                f"{phase.name}: {phase.variant} is switched on; with it activations take {format_bytes(phase.activation_bytes)}, "
                "and without it the phase does not fit"
            )
    found += _activation_sentences(drafts, setting)
    found += _disk_sentences(drafts, phases, setting)
    found += _time_sentences(chosen, phases)
    if any(phase.streamed for phase in phases) or (chosen.estimate is not None and chosen.estimate.total_s is not None):
        found.append(_rate_sentence(setting, any(phase.streamed or phase.expert_cache_bytes for phase in phases)))
    return tuple(found)


def _stays(phases: Sequence[PhasePlan]) -> bool:
    return not any(p.home is not Tier.DEVICE or p.experts_home is not None for phase in phases for p in phase.placements)


def _format_sentences(chosen: Candidate) -> Iterator[str]:
    form = chosen.recipe.format
    if form is None:
        return
    pairs = [
        (block.slab_bytes, weight.slab_bytes)
        for draft in chosen.drafts
        for (_, block), weight, owner, place in zip(
            draft.need.blocks, draft.need.weights, draft.need.owners, range(len(draft.need.blocks)), strict=True
        )
        if weight.format and owner == place
    ]
    before, after = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    yield (
        f"{form.name}: {len(pairs)} blocks take {format_bytes(after)} in place of {format_bytes(before)}, "
        f"{form.bits_per_weight:g} bits a weight of linear layers, relative error {form.relative_error:.2g}"
    )


def _residency_sentences(phase: PhasePlan) -> Iterator[str]:
    if not phase.streamed:
        return
    for component in phase.components:
        own = [p for p in phase.placements if p.component == component]
        streamed = [p for p in own if p.tier is not Tier.DEVICE]
        if streamed:
            nbytes = format_bytes(sum(p.stored_bytes for p in streamed))
            yield f"{component}: {len(own) - len(streamed)} of {len(own)} blocks resident, {len(streamed)} streamed ({nbytes} per pass)"
    sizes = [p.stored_bytes for p in phase.streamed if p.stored_bytes]
    if len(sizes) > 1 and phase.staging_bytes < max(sizes) + min(sizes):
        staging = format_bytes(phase.staging_bytes)
        yield f"{phase.name}: {staging} of staging, for more leaves too little room: copies wait for the streamed block before them"


def _expert_sentences(draft: Draft, phase: PhasePlan, setting: Setting) -> Iterator[str]:
    if not draft.expert_cache_bytes:
        return
    banks = [
        (block.experts, weight.expert_bytes)
        for (_, block), weight, place in zip(draft.need.blocks, draft.need.weights, phase.placements, strict=True)
        if block.experts is not None and place.experts_home is not None
    ]
    count = sum(experts.count for experts, _ in banks)
    total = sum(experts.count * nbytes for experts, nbytes in banks)
    active = sum(experts.per_token * nbytes for experts, nbytes in banks)
    slots = draft.expert_cache_bytes // slot_bytes(max(nbytes for _, nbytes in banks), setting.in_ram)
    yield (
        f"{phase.name}: {count} experts wait outside, {format_bytes(total)}; a cache of {format_bytes(draft.expert_cache_bytes)} holds "
        f"{slots} of them ({100 * slots / count:.0f} %); a token uses {format_bytes(active)}"
    )
    known = "by what earlier runs asked for" if all(experts.heat for experts, _ in banks) else "as published of other models"
    for one in phase.passes:
        if one.expert_hit_rate is not None:
            at = f" at {format_bytes(round(one.missed_expert_bytes / one.transfer_s))}/s" if one.transfer_s else ""
            yield (
                f"{one.component} {one.name}: {100 * one.expert_hit_rate:.0f} % of the experts that it asks for are in the cache, {known}; "
                f"{format_bytes(one.missed_expert_bytes)} of missed experts{at}"
            )


def _activation_sentences(drafts: Sequence[Draft], setting: Setting) -> Iterator[str]:
    if setting.limits.reserve_bytes is not None:
        yield f"activations: {format_bytes(setting.limits.reserve_bytes)} kept free in every phase, as asked"
        return
    known: dict[str, list[str]] = {}
    unknown, notes = [], []
    for draft in drafts:
        for component, profiles in zip(draft.need.components, draft.need.profiles, strict=True):
            source = profiles[0].source if profiles else component.activation_source
            nbytes = max((p.activation_bytes for p in profiles), default=component.activation_bytes)
            notes += [f"{component.name}: not traced, for {p.note}" for p in profiles[:1] if p.note]
            if source in _SOURCES:
                known.setdefault(source, []).append(f"{component.name} ({format_bytes(nbytes)})")
            else:
                unknown.append(component.name)
    for source, words in _SOURCES.items():
        if source in known:
            yield f"activations: {words} for {', '.join(known[source])}"
    if unknown:
        yield f"activations: nobody knows those of {', '.join(unknown)}; keep room for them with a reserve"
    yield from notes


def _disk_sentences(drafts: Sequence[Draft], phases: Sequence[PhasePlan], setting: Setting) -> Iterator[str]:
    machine = setting.machine
    disk_bytes = sum(phase.estimate.disk_bytes for phase in phases)
    if disk_bytes > machine.disk_free_bytes:
        yield (
            f"disk: {format_bytes(disk_bytes)} are read from it and {format_bytes(machine.disk_free_bytes)} are free; "
            "that is enough only where the model's own files can be read as they are"
        )
    if machine.compute.unified:
        return
    for draft, phase in zip(drafts, phases, strict=True):
        if not any(p.tier is Tier.DISK for p in phase.streamed):
            continue
        blocks = sum(p.stored_bytes for p in phase.placements if p.home is Tier.PINNED)
        fixed = draft.need.fixed_bytes if phase.fixed_home is Tier.PINNED else 0
        ring_bytes = phase.estimate.pinned_bytes - blocks - fixed
        if ring_bytes:
            yield f"{phase.name}: blocks from disk pass through {format_bytes(ring_bytes)} of pinned RAM"
        else:
            yield f"{phase.name}: blocks from disk pass through pageable RAM, because none is left to pin"


def _time_sentences(chosen: Candidate, phases: Sequence[PhasePlan]) -> Iterator[str]:
    for phase in phases:
        for one in phase.passes:
            if one.pass_s is None or one.bound_by is None or one.compute_s is None:
                continue
            waits = f", of which {format_seconds(one.stall_s)} waiting" if one.stall_s and one.stall_s > 1e-3 * one.pass_s else ""
            copies = f", {format_seconds(one.transfer_s)} of copies" if one.transfer_s else ""
            times = "" if one.count == 1 else f", {one.count} times"
            yield (
                f"{one.component} {one.name}: {format_seconds(one.pass_s)} a pass{times}{waits}; {format_seconds(one.compute_s)} of "
                f"computing{copies}; {_BOUND_WORDS[one.bound_by]} bound"
            )
    estimate = chosen.estimate
    if estimate is None or estimate.total_s is None:
        return
    if estimate.token_s:
        first = f"first token after {format_seconds(estimate.first_token_s)}, then " if estimate.first_token_s is not None else ""
        yield f"{first}{chosen.setting.workload.batch / estimate.token_s:.3g} tokens a second"
    yield f"a unit of work takes {format_seconds(estimate.total_s)}"


def _rate_sentence(setting: Setting, moves: bool) -> str:
    rates = setting.rates
    known = _RATE_WORDS.get(rates.source, "assumed, not measured rates")
    parts = []
    if moves:
        h2d, disk = (f"{format_bytes(round(rate))}/s" for rate in (rates.h2d_bytes_per_s, rates.disk_bytes_per_s))
        parts.append(f"{disk} from disk" if setting.in_ram else f"{h2d} to the device and {disk} from disk")
    if rates.memory_bytes_per_s:
        parts.append(f"{format_bytes(round(rates.memory_bytes_per_s))}/s in its memory")
    fastest = [rate for rate in rates.compute if rate.kind == "matmul" and rate.dtype == "BF16"]
    if fastest:
        parts.append(f"{fastest[0].flop_per_s / 1e12:.4g} TFLOP/s in BF16")
    kind = "times" if rates.compute else "transfer times"
    return f"{kind} rest on {known}: {', '.join(parts)}"
