"""Expert offload: the dense part of a mixture of experts and a cache of experts on the device, all experts in RAM or on disk.

Note [hit rate]. On a model with 512 experts a layer a least-recently-used cache of 64 of them finds 67 % of those that a token asks for,
one of 128 finds 81 % (llama.cpp, pull request 27861); with fewer slots than three times the experts of a token the hits fall to nothing
(imp, pull request 1375). Between these points the model draws straight lines over the share of experts that is cached; a cache of all
finds all. A pass that touches most experts (a prefill) has nothing to gain from recency: it finds the share that is cached.

Note [misses]. A token's experts are known when its router has run, so their copies are not hidden: a block takes its computing and then its
copies. Where a pass touches most experts, they are brought in like streamed blocks, while others compute. Missed experts may also be
computed
where they are: the CPU reads them from RAM at 65 % of its memory rate (kernels of experts reach 61 to 75 % of STREAM), and does so where
that is faster than the copy, and only for passes of fewer tokens than 32 times all experts over those of a token (ik_llama.cpp, pull
request 520).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from overflowml_core.activations import ASSUMED_TOKENS
from overflowml_core.facts import Experts, Tier, Workload
from overflowml_core.machine import Rates
from overflowml_core.planner import reasons
from overflowml_core.planner.candidates import Candidate, requirements, settled, whole_residency
from overflowml_core.planner.cost import Spent
from overflowml_core.planner.estimates import PhaseForecast, PhaseRun, assembled, brought_bytes, forecast, whole
from overflowml_core.planner.homes import Draft, PhaseHomes, assign, spread_within
from overflowml_core.planner.memory import pinned_budget
from overflowml_core.planner.needs import PhaseNeed, Recipe, phase_needs
from overflowml_core.planner.pace import Stage
from overflowml_core.planner.residency import choose
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.setting import Setting
from overflowml_core.planner.stage import pageable_bytes_per_s, switch_seconds

_HIT_POINTS = ((0.0, 0.0), (64 / 512, 0.67), (128 / 512, 0.81), (1.0, 1.0))
"""(share of experts cached, share of those asked for that are found); see note [hit rate]."""

_LEAST_SLOTS = 3
"""Times the experts that a token uses; with fewer slots a least-recently-used cache finds nothing."""

_FETCH_SLOTS = 2
"""Times the experts that a token uses: what the cache holds at least, those that compute and those that are fetched."""

_CPU_MEMORY_SHARE = 0.65
"""Of the memory rate of the CPU that kernels of experts reach; see note [misses]."""

_CPU_MOST_TOKENS = 32
"""Times all experts over those of a token: passes of more tokens copy experts; see note [misses]."""

_MANY = 10**9


def hit_share(experts: Experts, slots: float, touched: float) -> float:
    """Share of the experts asked for that a cache holds; see note [hit rate].

    Args:
        experts: of a block.
        slots: how many of them the cache holds.
        touched: how many different ones a pass asks for.
    """
    if slots >= experts.count:
        return 1.0
    cached = slots / experts.count
    if 2 * touched > experts.count:
        return cached
    if slots < _LEAST_SLOTS * max(experts.per_token, touched):
        return 0.0
    for (left, low), (right, high) in pairwise(_HIT_POINTS):
        if cached <= right:
            return low + (high - low) * (cached - left) / (right - left)
    return 1.0


def touched_experts(experts: Experts, tokens: int) -> float:
    """How many different experts so many tokens ask for, if each chooses at random."""
    return experts.count * (1 - (1 - min(1.0, experts.per_token / experts.count)) ** tokens)


def tokens_of(name: str, workload: Workload) -> int:
    """Tokens that a pass carries; very many where the pass is not one of a language model."""
    if name == "token":
        return workload.batch
    if name == "prefill":
        return (workload.prompt_tokens or ASSUMED_TOKENS) * workload.batch
    return _MANY


def expert_candidate(setting: Setting, recipe: Recipe) -> Candidate | None:
    """Expert offload with weights in a format; None where the network has no experts apart or everything fits without."""
    needs = phase_needs(setting.network, setting.limits, recipe)
    if not any(_has_experts(need) for need in needs) or setting.in_ram:
        return None
    if any(_has_experts(need) and need.whole_bytes <= setting.budget.device_bytes for need in needs):
        return None
    required = {"experts"} | requirements(recipe)
    candidate = Candidate("experts", recipe, setting, requires=frozenset(required))
    drafts = []
    for need in needs:
        draft = _dense_draft(need, setting) if _has_experts(need) else _plain_draft(need, setting)
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
    candidate.forecasts = tuple(_forecast(d, h, setting, turns) for d, h in zip(drafts, assigned, strict=True))
    candidate.estimate = whole(drafts, candidate.forecasts, False)
    return candidate


def _has_experts(need: PhaseNeed) -> bool:
    return any(block.experts is not None and size for (_, block), size in zip(need.blocks, need.sizes_bytes, strict=True))


def _expert_bytes(need: PhaseNeed, index: int) -> int:
    experts = need.blocks[index][1].experts
    return experts.count * need.weights[index].expert_bytes if experts is not None and need.sizes_bytes[index] else 0


def _plain_draft(need: PhaseNeed, setting: Setting) -> Draft | str:
    room = setting.budget.device_bytes - need.fixed_bytes - need.activation_bytes
    residency = choose(need.sizes_bytes, need.owners, room)
    return f"{need.name}: {reasons.of(need.smallest_bytes, setting.budget.device_bytes)}" if residency is None else Draft(need, residency)


def _dense_draft(need: PhaseNeed, setting: Setting) -> Draft | str:
    """The phase without its experts, all of it resident, and the rest of the budget as their cache."""
    budget_bytes = setting.budget.device_bytes
    banks = [_expert_bytes(need, index) for index in range(len(need.blocks))]
    dense = replace(need, sizes_bytes=tuple(max(0, size - bank) for size, bank in zip(need.sizes_bytes, banks, strict=True)))
    fetched = [b.experts.per_token * w.expert_bytes for (_, b), w in zip(need.blocks, need.weights, strict=True) if b.experts is not None]
    least_bytes = _FETCH_SLOTS * max(fetched, default=0)
    left_bytes = budget_bytes - dense.whole_bytes
    if left_bytes < least_bytes:
        return f"{need.name} without its experts needs {reasons.of(dense.whole_bytes + least_bytes, budget_bytes)}"
    return Draft(dense, whole_residency(dense), expert_cache_bytes=min(left_bytes, sum(banks)))


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
        # The sizes of the draft are those of the dense parts; what a block of experts takes is in its weights.
        banks = [(i, _bank_bytes(draft.need, i)) for i in range(len(draft.need.blocks)) if draft.need.owners[i] == i]
        waiting = [(i, nbytes) for i, nbytes in banks if nbytes]
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


def _bank_bytes(need: PhaseNeed, index: int) -> int:
    experts = need.blocks[index][1].experts
    return experts.count * need.weights[index].expert_bytes if experts is not None else 0


@dataclass(frozen=True, slots=True)
class _Misses:
    """What one block's missed experts cost in a pass: seconds, what the link is busy, and whether computing hides them."""

    seconds: float
    link_s: float
    hidden: bool


def _forecast(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseForecast:
    if not draft.expert_cache_bytes:
        return forecast(draft, homes, setting, takes_turns)
    found = expert_run(draft, homes, setting, takes_turns)
    if found is None:
        return assembled(draft, homes, None, takes_turns)
    run, links = found
    plain = assembled(draft, homes, run, takes_turns)
    passes = tuple(
        replace(p, transfer_s=link_s, bound_by="link" if link_s > (p.compute_s or 0.0) else p.bound_by)
        for p, link_s in zip(plain.passes, links, strict=True)
    )
    main = max(passes, key=lambda p: p.count * (p.pass_s or 0.0))
    moved = round((main.transfer_s or 0.0) * setting.rates.h2d_bytes_per_s)
    estimate = replace(plain.estimate, streamed_bytes=moved, transfer_s=main.transfer_s, bound_by=main.bound_by)
    return replace(plain, estimate=estimate, passes=passes)


def expert_run(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> tuple[PhaseRun, tuple[float, ...]] | None:
    """What the engines are given for a phase with offloaded experts, and what the link is busy with them in each of its passes.

    Returns:
        None where something that it needs is not known.
    """
    rounds = setting.rounds(draft.need)
    switch_s = switch_seconds(brought_bytes(draft, homes), setting.rates, False) if takes_turns else 0.0
    if rounds is None or switch_s is None:
        return None
    slowed: list[Round] = []
    links: list[float] = []
    for one in rounds:
        parts = []
        for part in one.parts:
            found = _slowed(part, draft, homes, setting, tokens_of(one.name, setting.workload))
            if found is None:
                return None
            parts.append(found[0])
            links.append(found[1])
        slowed.append(replace(one, parts=tuple(parts)))
    stage = Stage((None,) * len(draft.need.blocks), ((),), 0)
    return PhaseRun(rounds, tuple(slowed), stage, switch_s), tuple(links)


def _slowed(part: Part, draft: Draft, homes: PhaseHomes, setting: Setting, tokens: int) -> tuple[Part, float] | None:
    """A pass with what its missed experts cost, and what the link is busy in it; None where a rate is not known."""
    need = draft.need
    total_bank = sum(_bank_bytes(need, i) for i in range(len(need.blocks)) if need.owners[i] == i)
    seconds = list(part.seconds)
    link_s = hidden_s = shown_s = 0.0
    for place, index in enumerate(part.steps):
        experts = need.blocks[index][1].experts if index >= 0 else None
        tier = homes.experts[index] if index >= 0 else None
        if experts is None or tier is None:
            continue
        slots = draft.expert_cache_bytes * _bank_bytes(need, index) / total_bank / need.weights[index].expert_bytes
        misses = _misses(experts, need.weights[index].expert_bytes, slots, tier, setting, tokens)
        if misses is None:
            return None
        link_s += misses.link_s
        if misses.hidden:
            hidden_s += misses.seconds
        else:
            seconds[place] += misses.seconds
            shown_s += misses.seconds
    total_s = part.spent.total_s + shown_s
    if hidden_s > total_s:
        seconds[-1] += hidden_s - total_s
        total_s = hidden_s
    return replace(part, seconds=tuple(seconds), spent=Spent(total_s, part.spent.memory_s)), link_s


def _misses(experts: Experts, expert_bytes: int, slots: float, tier: Tier, setting: Setting, tokens: int) -> _Misses | None:
    touched = touched_experts(experts, tokens)
    missed = touched * (1 - hit_share(experts, slots, touched))
    hidden = 2 * touched > experts.count
    rate = _fetch_rate(tier, setting.rates)
    if rate <= 0:
        return None
    copy_s = missed * expert_bytes / rate
    cpu_s = _on_cpu(missed * expert_bytes, tier, setting.machine.cpu_rates, tokens * experts.per_token < _CPU_MOST_TOKENS * experts.count)
    if not hidden and cpu_s is not None and cpu_s < copy_s:
        return _Misses(cpu_s, 0.0, False)
    return _Misses(copy_s, copy_s, hidden)


def _fetch_rate(tier: Tier, rates: Rates) -> float:
    if tier is Tier.DISK:
        return min(rates.disk_bytes_per_s, rates.h2d_bytes_per_s)
    return rates.h2d_bytes_per_s if tier is Tier.PINNED else pageable_bytes_per_s(rates)


def _on_cpu(nbytes: float, tier: Tier, rates: Rates | None, few: bool) -> float | None:
    """Seconds in which the CPU computes with so many bytes of experts where they are; None where it should not."""
    if rates is None or rates.memory_bytes_per_s <= 0 or tier is Tier.DISK or not few:
        return None
    return nbytes / (rates.memory_bytes_per_s * _CPU_MEMORY_SHARE)
