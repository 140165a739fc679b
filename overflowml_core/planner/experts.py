"""Expert offload: the dense part of a mixture of experts and a cache of experts on the device, all experts in RAM or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.facts import Tier
from overflowml_core.planner import reasons
from overflowml_core.planner.candidates import EXPERT_FORMATS, Candidate, requirements, settled, whole_residency
from overflowml_core.planner.conversion import weigh_apart
from overflowml_core.planner.estimates import forecast, whole
from overflowml_core.planner.expert_pace import expert_forecast, slot_bytes
from overflowml_core.planner.homes import Draft, PhaseHomes, assign, spread_within
from overflowml_core.planner.memory import pinned_budget
from overflowml_core.planner.needs import PhaseNeed, Recipe, phase_needs
from overflowml_core.planner.residency import choose
from overflowml_core.planner.setting import Setting

_LEAST_SLOTS = 2
"""One expert computes while another comes in."""


def expert_candidate(setting: Setting, recipe: Recipe) -> Candidate | None:
    """Expert offload with weights in a format; None where the network has no routed experts or everything fits without."""
    together = phase_needs(setting.network, setting.limits, recipe)
    if not any(_routed(need) for need in together):
        return None
    # In their blocks stacked experts stay as they are stored: whether everything fits is asked of them so.
    if any(_routed(need) and need.whole_bytes <= setting.budget.device_bytes for need in together):
        return None
    needs = [_with_experts_apart(need, setting, recipe) for need in together]
    routed = [need for need in needs if _routed(need)]
    forecast_only = any(need.weights[index].format and not _is_exact(need, index) for need in routed for index in _apart(need))
    required = {"experts"} | requirements(recipe) | ({EXPERT_FORMATS} if forecast_only else set())
    candidate = Candidate("experts", recipe, setting, requires=frozenset(required))
    drafts = []
    for need in needs:
        draft = _dense_draft(need, setting) if _routed(need) else _plain_draft(need, setting)
        if isinstance(draft, str):
            candidate.reason = draft
            return candidate
        drafts.append(draft)
    candidate.drafts = tuple(drafts)
    turns = candidate.takes_turns
    host_bytes = setting.budget.host_bytes
    assigned = assign(drafts, pinned_budget(setting.machine, setting.budget), host_bytes)
    _place_experts(drafts, assigned, pinned_budget(setting.machine, setting.budget), host_bytes)
    if not settled(candidate, assigned):
        return candidate
    candidate.forecasts = tuple(
        (expert_forecast if draft.expert_cache_bytes else forecast)(draft, homes, setting, turns)
        for draft, homes in zip(drafts, assigned, strict=True)
    )
    candidate.estimate = whole(drafts, candidate.forecasts, False)
    return candidate


def _with_experts_apart(need: PhaseNeed, setting: Setting, recipe: Recipe) -> PhaseNeed:
    """A phase in which a format is that of the experts alone, in blocks where these can be kept apart."""
    if recipe.format is None or not _routed(need):
        return need
    weights = list(need.weights)
    for index, (component, block) in enumerate(need.blocks):
        experts = block.experts
        if need.owners[index] == index and experts is not None and experts.separable and component in recipe.components:
            weights[index] = weigh_apart(block, recipe.format)
    decoding_bytes = 0
    if setting.limits.reserve_bytes is None:
        decoding_bytes = max((weight.workspace_bytes for weight in weights), default=0)
    activation_bytes = need.activation_bytes - need.decoding_bytes + decoding_bytes
    sizes_bytes = tuple(weight.slab_bytes if need.owners[i] == i else 0 for i, weight in enumerate(weights))
    return replace(need, weights=tuple(weights), sizes_bytes=sizes_bytes, activation_bytes=activation_bytes, decoding_bytes=decoding_bytes)


def _is_exact(need: PhaseNeed, index: int) -> bool:
    """Whether the bytes of experts in a format are those of records that the runtime makes, and no estimate."""
    experts = need.blocks[index][1].experts
    return experts is not None and bool(experts.matrices)


def _routed(need: PhaseNeed) -> bool:
    return any(block.experts is not None and size for (_, block), size in zip(need.blocks, need.sizes_bytes, strict=True))


def _apart(need: PhaseNeed) -> list[int]:
    """The blocks whose routed experts can be kept apart from them."""
    return [
        index
        for index, (_, block) in enumerate(need.blocks)
        if need.owners[index] == index and block.experts is not None and block.experts.separable and need.weights[index].expert_bytes
    ]


def _bank_bytes(need: PhaseNeed, index: int) -> int:
    experts = need.blocks[index][1].experts
    return experts.count * need.weights[index].expert_bytes if experts is not None else 0


def _plain_draft(need: PhaseNeed, setting: Setting) -> Draft | str:
    room = setting.budget.device_bytes - need.fixed_bytes - need.activation_bytes
    residency = choose(need.sizes_bytes, need.owners, room)
    return f"{need.name}: {reasons.of(need.smallest_bytes, setting.budget.device_bytes)}" if residency is None else Draft(need, residency)


def _dense_draft(need: PhaseNeed, setting: Setting) -> Draft | str:
    """The phase without its experts, all of it resident, and the rest of the budget as their cache."""
    apart = _apart(need)
    if not apart:
        classes = ", ".join(dict.fromkeys(c.class_name for c in need.components if any(b.experts is not None for b in c.blocks)))
        return f"{need.name}: {classes} computes with all experts of a block at once, so that none can wait apart from it"
    sizes = list(need.sizes_bytes)
    for index in apart:
        sizes[index] = need.weights[index].dense_bytes
    dense = replace(need, sizes_bytes=tuple(sizes))
    slot = slot_bytes(max(need.weights[index].expert_bytes for index in apart), setting.in_ram)
    left_bytes = setting.budget.device_bytes - dense.whole_bytes
    if left_bytes < _LEAST_SLOTS * slot:
        needed = reasons.of(dense.whole_bytes + _LEAST_SLOTS * slot, setting.budget.device_bytes)
        return f"{need.name} without its experts and with room for {_LEAST_SLOTS} of them needs {needed}"
    count = sum(experts.count for index in apart if (experts := need.blocks[index][1].experts) is not None)
    return Draft(dense, whole_residency(dense), expert_cache_bytes=min(left_bytes // slot, count) * slot)


def _place_experts(drafts: Sequence[Draft], assigned: Sequence[PhaseHomes], pinned_bytes: int, host_bytes: int) -> None:
    """Give all experts homes: pinned RAM as far as it goes, evenly along the blocks, then pageable RAM, then the disk."""
    taken = dict.fromkeys(Tier, 0)
    for draft, phase in zip(drafts, assigned, strict=True):
        taken[phase.fixed] += draft.need.fixed_bytes
        for size, home in zip(draft.need.sizes_bytes, phase.blocks, strict=True):
            taken[home] += size
        taken[Tier.PINNED] += phase.ring_bytes
    host_left = host_bytes - taken[Tier.PINNED] - taken[Tier.RAM]
    pinned_left = min(pinned_bytes - taken[Tier.PINNED], host_left)
    for draft, phase in zip(drafts, assigned, strict=True):
        if not draft.expert_cache_bytes:
            continue
        phase.experts = [None] * len(draft.need.blocks)
        waiting = [(index, _bank_bytes(draft.need, index)) for index in _apart(draft.need)]
        for tier in (Tier.PINNED, Tier.RAM):
            room = pinned_left if tier is Tier.PINNED else host_left
            held = spread_within([nbytes for _, nbytes in waiting], max(0, room))
            for (index, nbytes), is_held in zip(waiting, held, strict=True):
                if is_held:
                    phase.experts[index] = tier
                    host_left -= nbytes
                    pinned_left -= nbytes if tier is Tier.PINNED else 0
            waiting = [bank for bank, is_held in zip(waiting, held, strict=True) if not is_held]
        for index, _ in waiting:
            phase.experts[index] = Tier.DISK
