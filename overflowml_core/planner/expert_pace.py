"""What missed experts cost: seconds and bytes of each pass of a phase whose experts are cached. Decides nothing.

Note [a layer]. When a router has run, all experts that it misses are requested at once. Those that are cached compute meanwhile, the others
as they arrive: a layer takes what it computes without its experts, and then what it computes with them, made longer by the wait for those
that are missed (expert_wait.py). Where an expert has few tokens, it computes no longer than its weights take to be read from memory; what
else a layer takes then, its attention and the calls of all that, hides nothing. What the runtime brings in ahead of time, while other parts
compute, is not counted on.

Note [processor]. On an accelerator, experts that wait in RAM may be computed where they are while others are copied: the CPU reads them at
65 % of its memory rate (kernels of experts reach 61 to 75 % of STREAM), and only in passes of no more tokens than 32 times all experts over
those of a token (ik_llama.cpp, pull request 520). Each one goes where it is done first, so that both rates add up; a single one takes the
faster of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from overflowml_core.activations import ASSUMED_TOKENS
from overflowml_core.facts import Experts, Tier, Workload
from overflowml_core.layout import EXPERT_SPARE_BYTES
from overflowml_core.machine import Machine, Rates
from overflowml_core.plan import PassEstimate
from overflowml_core.planner.cost import Spent
from overflowml_core.planner.estimates import PhaseForecast, PhaseRun, assembled, brought_bytes
from overflowml_core.planner.expert_hits import Asked, asked_of
from overflowml_core.planner.expert_wait import expected_wait_s
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.planner.pace import Stage
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.setting import Setting
from overflowml_core.planner.stage import pageable_bytes_per_s, switch_seconds
from overflowml_core.work import BlockWork, PassProfile

_AT_ONCE_IN_RAM, _AT_ONCE = 4, 1
"""Experts that are brought in at the same time: by the threads that read them into RAM, and over a link, which copies in order."""

_CPU_MEMORY_SHARE = 0.65
"""Of the memory rate of the CPU that kernels of experts reach; see note [processor]."""

_CPU_MOST_TOKENS = 32
"""Times all experts over those of a token: passes of more tokens copy experts; see note [processor]."""

_FEW_TOKENS = 4
"""Of each expert that is asked for: with no more its product is bound by the memory that its weights come from."""

_MANY = 10**9


@dataclass(frozen=True, slots=True)
class Fetch:
    """What one pass does with the experts of one block.

    Attributes:
        experts: of the block.
        asked: how many of them it asks for, and how many of these the cache does not hold.
        expert_bytes: of one, as it waits.
        tier: where they wait.
        few: so few tokens that the processor may compute with those that it has; see note [processor].
        link_s, disk_s: what copies to the device and reads from disk are busy with those that are missed; None where a rate is not known.
        fetch_s: until the last of them is there, or was computed where it waits; None where a rate is not known.
        read_s: what those that are asked for take to compute where memory is the bound; infinite where it may be more.
    """

    experts: Experts
    asked: Asked
    expert_bytes: int
    tier: Tier
    few: bool
    link_s: float | None
    disk_s: float | None
    fetch_s: float | None
    read_s: float


def tokens_of(name: str, workload: Workload) -> int:
    """Tokens that a pass carries; very many where the pass is not one of a language model."""
    if name == "token":
        return workload.batch
    if name == "prefill":
        return (workload.prompt_tokens or ASSUMED_TOKENS) * workload.batch
    return _MANY


def fetch_bytes_per_s(tier: Tier, rates: Rates, in_ram: bool) -> float:
    """Rate at which experts come from where they wait; 0 where it is not known.

    Args:
        tier: where they wait.
        rates: of the device that computes.
        in_ram: it computes in RAM, so that what is read from disk is there.
    """
    if tier is Tier.DISK:
        return rates.disk_bytes_per_s if in_ram else min(rates.disk_bytes_per_s, rates.h2d_bytes_per_s)
    return rates.h2d_bytes_per_s if tier is Tier.PINNED else pageable_bytes_per_s(rates)


def cpu_bytes_per_s(machine: Machine) -> float:
    """Rate at which the CPU computes with experts that wait in RAM, beside an accelerator; 0 where nobody knows, or there is no other."""
    rates = machine.cpu_rates
    return 0.0 if rates is None or machine.compute.unified else rates.memory_bytes_per_s * _CPU_MEMORY_SHARE


def slot_bytes(record_bytes: int, in_ram: bool) -> int:
    """What a slot of the cache takes for experts of this size: in RAM whole pages around them are read straight into it."""
    return record_bytes + (EXPERT_SPARE_BYTES if in_ram else 0)


def slots_of(need: PhaseNeed, homes: PhaseHomes, cache_bytes: int, in_ram: bool) -> int:
    """Experts that a cache of this size holds."""
    largest = max(need.weights[index].expert_bytes for index, tier in enumerate(homes.experts) if tier is not None)
    return cache_bytes // slot_bytes(largest, in_ram)


def expert_forecast(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseForecast:
    """What a phase takes with its experts in a cache; arguments as for :func:`~overflowml_core.planner.estimates.forecast`."""
    plain = assembled(draft, homes, expert_run(draft, homes, setting, takes_turns), takes_turns)
    passes = tuple(_told(one, draft, homes, setting) for one in plain.passes)
    # Where nobody profiled it, a phase is compared by what a token moves.
    main = max(passes, key=lambda p: p.count * (p.pass_s or 1.0), default=None)
    moved = _missed_bytes(_fetches(draft, homes, setting, "token", None)) if main is None else main.missed_expert_bytes
    estimate = replace(plain.estimate, streamed_bytes=moved)
    if main is not None and plain.estimate.pass_s is not None:
        estimate = replace(estimate, transfer_s=main.transfer_s, bound_by=main.bound_by)
    return replace(plain, estimate=estimate, passes=passes)


def _told(one: PassEstimate, draft: Draft, homes: PhaseHomes, setting: Setting) -> PassEstimate:
    """A pass with what it does with experts."""
    fetches = _fetches(draft, homes, setting, one.name, one.component)
    touched, missed = sum(f.asked.touched for f in fetches.values()), sum(f.asked.missed for f in fetches.values())
    if not touched:
        return one
    asked = round(sum(f.asked.touched * f.expert_bytes for f in fetches.values()))
    one = replace(one, expert_bytes=asked, expert_hit_rate=1 - missed / touched, missed_expert_bytes=_missed_bytes(fetches))
    if one.pass_s is None:
        return one
    link_s, disk_s = sum(f.link_s or 0.0 for f in fetches.values()), sum(f.disk_s or 0.0 for f in fetches.values())
    bound_by = "disk" if disk_s > link_s else "link"
    return replace(one, transfer_s=max(link_s, disk_s), bound_by=bound_by if max(link_s, disk_s) > (one.compute_s or 0.0) else one.bound_by)


def _missed_bytes(fetches: Mapping[int, Fetch]) -> int:
    return round(sum(fetch.asked.missed * fetch.expert_bytes for fetch in fetches.values()))


def expert_run(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseRun | None:
    """What the engines are given for a phase with cached experts; None where something that it needs is not known."""
    rounds = setting.rounds(draft.need)
    switch_s = switch_seconds(brought_bytes(draft, homes), setting.rates, setting.in_ram) if takes_turns else 0.0
    if rounds is None or switch_s is None:
        return None
    slowed: list[Round] = []
    for one in rounds:
        parts = []
        for part in one.parts:
            fetches = _fetches(draft, homes, setting, one.name, part.component)
            if any(fetch.fetch_s is None for fetch in fetches.values()):
                return None
            parts.append(_slowed(part, fetches, draft.need, setting))
        slowed.append(replace(one, parts=tuple(parts)))
    stage = Stage((None,) * len(draft.need.blocks), ((),), 0, in_ram=setting.in_ram)
    return PhaseRun(rounds, tuple(slowed), stage, switch_s)


def _fetches(draft: Draft, homes: PhaseHomes, setting: Setting, name: str, component: str | None) -> dict[int, Fetch]:
    """By block: what a pass of this name does with experts; of all components where None is named."""
    need = draft.need
    apart = [i for i, tier in enumerate(homes.experts) if tier is not None and need.owners[i] == i]
    banks = {i: experts for i in apart if (experts := need.blocks[i][1].experts) is not None}
    called = {i: experts for i, experts in banks.items() if component in (None, need.blocks[i][0]) and _runs(need, i, name)}
    tokens = tokens_of(name, setting.workload)
    slots = slots_of(need, homes, draft.expert_cache_bytes, setting.in_ram)
    asked = dict(zip(banks, asked_of(tuple(banks.values()), slots, tokens), strict=True))
    found: dict[int, Fetch] = {}
    for index, experts in called.items():
        tier, size = homes.experts[index], need.weights[index].expert_bytes
        assert tier is not None  # it is apart
        few = tokens * experts.per_token <= _CPU_MOST_TOKENS * experts.count
        link_s, disk_s, fetch_s = _seconds(asked[index].missed, size, tier, setting, few)
        memory_rate = setting.rates.memory_bytes_per_s if tokens * experts.per_token <= _FEW_TOKENS * asked[index].touched else 0.0
        read_s = asked[index].touched * experts.nbytes / memory_rate if memory_rate > 0 else inf
        found[index] = Fetch(experts, asked[index], size, tier, few, link_s, disk_s, fetch_s, read_s)
    return found


def _runs(need: PhaseNeed, index: int, name: str) -> bool:
    """Whether passes of a name call a block; models hold some that only guess further tokens."""
    name_of = need.blocks[index][0]
    place = index - _first_of(need, index)
    profiles = next((own for c, own in zip(need.components, need.profiles, strict=True) if c.name == name_of), ())
    works = [_work_of(profile, place) for profile in profiles if profile.name == name]
    return not works or any(work is None or work.calls > 0 for work in works)


def _seconds(missed: float, nbytes: int, tier: Tier, setting: Setting, few: bool) -> tuple[float | None, float | None, float | None]:
    """What the link and the disk are busy with missed experts, and when all of them are there or were computed where they wait."""
    rate = fetch_bytes_per_s(tier, setting.rates, setting.in_ram)
    if rate <= 0:
        return (None, None, None) if missed else (0.0, 0.0, 0.0)
    each_s = nbytes / rate
    if tier is Tier.DISK:
        link_s = 0.0 if setting.in_ram else missed * nbytes / setting.rates.h2d_bytes_per_s
        return link_s, missed * nbytes / setting.rates.disk_bytes_per_s, missed * each_s
    cpu_rate = cpu_bytes_per_s(setting.machine) if few else 0.0
    if cpu_rate <= 0 or not nbytes:
        return missed * each_s, 0.0, missed * each_s
    fastest_s = min(each_s, nbytes / cpu_rate) * min(1.0, missed)
    shared_s = missed * nbytes / (rate + cpu_rate)
    if fastest_s > shared_s:
        return (fastest_s if each_s <= nbytes / cpu_rate else 0.0), 0.0, fastest_s
    return shared_s, 0.0, shared_s


def _slowed(part: Part, fetches: Mapping[int, Fetch], need: PhaseNeed, setting: Setting) -> Part:
    """A pass with what it waits for missed experts; see note [a layer]."""
    seconds = list(part.seconds)
    waited_s = 0.0
    left = dict(fetches)
    for place, index in enumerate(part.steps):
        fetch = left.pop(index, None)
        if fetch is None or fetch.fetch_s is None:
            continue
        experts_s = min(seconds[place] * _experts_share(part.profile, fetch, need, index), fetch.read_s)
        wait_s = _wait_s(fetch, experts_s, setting)
        seconds[place] += wait_s
        waited_s += wait_s
    return replace(part, seconds=tuple(seconds), spent=Spent(part.spent.total_s + waited_s, part.spent.memory_s))


def _wait_s(fetch: Fetch, experts_s: float, setting: Setting) -> float:
    """By how much those that are missed make the computing of experts longer."""

    def until_s(missed: float) -> float:
        # Where a rate is not known nothing is slowed.
        return _seconds(missed, fetch.expert_bytes, fetch.tier, setting, fetch.few)[2] or 0.0

    at_once = _AT_ONCE_IN_RAM if setting.in_ram else _AT_ONCE
    return expected_wait_s((fetch.asked.touched, fetch.asked.missed), at_once, experts_s, until_s)


def _experts_share(profile: PassProfile, fetch: Fetch, need: PhaseNeed, index: int) -> float:
    """Of what a block computes in a pass, what its routed experts do, by the bytes of weights that are read."""
    work = _work_of(profile, index - _first_of(need, index))
    weight_bytes = 0 if work is None else sum(one.weight_bytes for one in work.works)
    return min(1.0, fetch.asked.touched * fetch.experts.nbytes / weight_bytes) if weight_bytes else 0.0


def _work_of(profile: PassProfile, place: int) -> BlockWork | None:
    return profile.blocks[place] if place < len(profile.blocks) else None


def _first_of(need: PhaseNeed, index: int) -> int:
    """Index of the first block of the component that a block belongs to."""
    first = 0
    for component in need.components:
        if index < first + len(component.blocks):
            return first
        first += len(component.blocks)
    return first
