"""Other devices than the first: several accelerators with consecutive blocks each, and the CPU alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.facts import Tier
from overflowml_core.planner import reasons
from overflowml_core.planner.candidates import Candidate, requirements, settled, whole_residency, worked_out
from overflowml_core.planner.cost import Costs, Spent
from overflowml_core.planner.estimates import PhaseRun, assembled, whole
from overflowml_core.planner.homes import Draft, PhaseHomes, assign
from overflowml_core.planner.machinery import Move
from overflowml_core.planner.memory import pinned_budget, resolve_budget
from overflowml_core.planner.needs import AS_IS, PhaseNeed, Recipe, phase_needs, together_bytes
from overflowml_core.planner.pace import Stage
from overflowml_core.planner.residency import Residency, choose
from overflowml_core.planner.rounds import Part, Round, rounds_of
from overflowml_core.planner.setting import Setting, on_cpu
from overflowml_core.planner.stage import move_of, rates_of, switch_seconds


def cpu_candidate(setting: Setting) -> Candidate | None:
    """Everything in RAM, computed by the CPU; None where the CPU is the device anyway, shares its memory, or may not have any."""
    if setting.in_ram:
        return None
    limits = setting.limits
    if limits.reserve_bytes is not None and limits.host_bytes is not None and limits.reserve_bytes >= limits.host_bytes:
        return None  # RAM was granted for what waits, not for what computes
    other = on_cpu(setting)
    candidate = Candidate("cpu", AS_IS, other, requires=frozenset({"devices"}))
    needs = phase_needs(setting.network, setting.limits)
    together = together_bytes(needs)
    if together > other.budget.device_bytes:
        candidate.reason = f"needs {reasons.of(together, other.budget.device_bytes)} of RAM"
        return candidate
    candidate.drafts = tuple(Draft(need, whole_residency(need)) for need in needs)
    return worked_out(candidate)


def split_candidate(setting: Setting, recipe: Recipe) -> Candidate | None:
    """Consecutive blocks on several accelerators, each of which streams what does not fit on it; None where there is one.

    Blocks follow one another from device to device, so that one computes while all others copy. Every device gets as many consecutive
    blocks as its room has of all rooms. Activations are handed on through RAM. Each keeps the activations of the whole phase free,
    and what lies outside blocks is on the first.
    """
    accelerators = setting.machine.accelerators
    if len(accelerators) < 2 or any(a.unified for a in accelerators):
        return None
    required = {"devices"} | requirements(recipe)
    budgets = tuple(_budget(setting, index) for index in range(len(accelerators)))
    candidate = Candidate("devices", recipe, setting, requires=frozenset(required))
    candidate.devices = tuple(a.torch_name for a in accelerators)
    candidate.each_bytes = budgets
    needs = phase_needs(setting.network, setting.limits, recipe)
    drafts = []
    for need in needs:
        draft = _split(need, budgets)
        if draft is None:
            candidate.reason = f"{need.name}: no share of its blocks fits beside its slots on every device"
            return candidate
        drafts.append(draft)
    candidate.drafts = tuple(drafts)
    assigned = assign(drafts, pinned_budget(setting.machine, setting.budget), setting.budget.host_bytes)
    if not settled(candidate, assigned):
        return candidate
    turns = candidate.takes_turns
    costs = costs_of(setting)
    candidate.forecasts = tuple(
        assembled(d, h, split_run(d, h, setting, costs, turns), turns) for d, h in zip(drafts, assigned, strict=True)
    )
    candidate.estimate = whole(drafts, candidate.forecasts, False)
    return candidate


def _budget(setting: Setting, index: int) -> int:
    alone = replace(setting.machine, accelerators=(setting.machine.accelerators[index],))
    return resolve_budget(alone, setting.limits)[0].device_bytes


def _split(need: PhaseNeed, budgets: Sequence[int]) -> Draft | None:
    """Give each device consecutive blocks in proportion to its room, and choose its residents."""
    rooms = [b - need.activation_bytes - (need.fixed_bytes if index == 0 else 0) for index, b in enumerate(budgets)]
    if min(rooms, default=0) < 0:
        return None
    devices = _shares(need.sizes_bytes, rooms)
    devices = [devices[owner] for owner in need.owners]
    resident = [True] * len(devices)
    slots: list[Residency] = []
    for index, room in enumerate(rooms):
        sizes = [size if device == index else 0 for size, device in zip(need.sizes_bytes, devices, strict=True)]
        choice = choose(sizes, need.owners, room)
        if choice is None:
            return None
        slots.append(choice)
        for place, device in enumerate(devices):
            if device == index:
                resident[place] = choice.resident[place]
    staging_bytes = max(choice.staging_bytes for choice in slots)
    slot_bytes = max(choice.slot_bytes for choice in slots)
    # All devices have as large a staging buffer; a device with smaller blocks than another's may not hold them beside its residents.
    for index, (room, choice) in enumerate(zip(rooms, slots, strict=True)):
        own = zip(need.sizes_bytes, devices, resident, strict=True)
        kept = sum(size for size, device, stays in own if device == index and stays)
        if choice.staging_bytes and kept + staging_bytes > room:
            return None
    return Draft(need, Residency(tuple(resident), staging_bytes, slot_bytes), tuple(devices))


def _shares(sizes_bytes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    total, all_rooms = sum(sizes_bytes), sum(rooms)
    devices, device, seen, within = [], 0, 0, 0
    # Where everything fits, the first devices are filled up: fewer hand-overs, and fewer devices.
    limits = list(rooms) if total <= all_rooms else [total * room // max(1, all_rooms) for room in rooms]
    for size in sizes_bytes:
        while device < len(rooms) - 1 and within + size > limits[device]:
            device, within = device + 1, 0
        devices.append(device)
        within += size
        seen += size
    return devices


def costs_of(setting: Setting) -> tuple[Costs, ...]:
    """Costs of computing on each accelerator."""
    others = range(1, len(setting.machine.accelerators))
    return (setting.costs, *(Costs(rates_of(setting.machine, index)) for index in others))


def split_run(draft: Draft, homes: PhaseHomes, setting: Setting, costs: Sequence[Costs], takes_turns: bool) -> PhaseRun | None:
    """What the engines are given for a phase on several devices; None where something that it needs is not known."""
    need = draft.need
    per_device = [setting.rounds(need), *(rounds_of(need, cost) for cost in costs[1:])]
    slots_of: list[tuple[int, int] | None] = [None] * len(need.blocks)
    moves: list[list[Move]] = [[] for _ in costs]
    brought = [dict.fromkeys(Tier, 0) for _ in costs]
    brought[0][homes.fixed] += need.fixed_bytes
    known = True
    for index, (size, stays, home) in enumerate(zip(need.sizes_bytes, draft.residency.resident, homes.blocks, strict=True)):
        device = draft.devices[index]
        if stays or not size:
            brought[device][home] += size
            continue
        move = move_of(size, home, costs[device].rates, draft.residency.slot_bytes, False)
        if move is None:
            known = False
            break
        slots_of[index] = (device, len(moves[device]))
        moves[device].append(move)
    switches = [switch_seconds(brought[d], costs[d].rates, False) if takes_turns else 0.0 for d in range(len(costs))]
    handoff_s = _handoff_s(need, setting)
    rounds = _blended(need, per_device, draft.devices)
    if not known or rounds is None or handoff_s is None or None in switches:
        return None
    stage = Stage(
        tuple(slots_of), tuple(tuple(m) for m in moves), draft.residency.staging_bytes, devices=draft.devices, handoff_s=handoff_s
    )
    # Devices bring their residents in at the same time, each over its own link.
    return PhaseRun(rounds, rounds, stage, max(s for s in switches if s is not None))


def _handoff_s(need: PhaseNeed, setting: Setting) -> float | None:
    """From device to device through RAM: no more than the least that any block holds, which contains its input."""
    held = [work.activation_bytes for profiles in need.profiles for p in profiles for work in p.blocks if work.activation_bytes]
    rates = setting.rates
    if not held:
        return 0.0
    if rates.h2d_bytes_per_s <= 0 or rates.d2h_bytes_per_s <= 0:
        return None
    return min(held) / rates.d2h_bytes_per_s + min(held) / rates.h2d_bytes_per_s


def _blended(need: PhaseNeed, per_device: Sequence[tuple[Round, ...] | None], devices: Sequence[int]) -> tuple[Round, ...] | None:
    """The rounds with each step's seconds on the device that computes it."""
    known = [rounds for rounds in per_device if rounds is not None]
    if len(known) < len(per_device):
        return None
    found = []
    for place, one in enumerate(known[0]):
        parts = tuple(_blended_part([rounds[place].parts[i] for rounds in known], devices) for i in range(len(one.parts)))
        found.append(replace(one, parts=parts))
    return tuple(found)


def _blended_part(parts: Sequence[Part], devices: Sequence[int]) -> Part:
    first = parts[0]
    seconds = tuple(parts[devices[index] if index >= 0 else 0].seconds[place] for place, index in enumerate(first.steps))
    total_s = sum(seconds)
    share = first.spent.memory_s / first.spent.total_s if first.spent.total_s else 0.0
    return replace(first, seconds=seconds, spent=Spent(total_s, total_s * share))
