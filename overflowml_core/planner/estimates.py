"""Predictions: what a phase with its residency and homes takes, in bytes and seconds. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.facts import Tier
from overflowml_core.plan import Estimate, PassEstimate
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.needs import together_bytes
from overflowml_core.planner.pace import Pace, Stage, pace_of
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.setting import Setting
from overflowml_core.planner.stage import stage_of, switch_seconds


@dataclass(frozen=True, slots=True)
class PhaseForecast:
    """What one phase will take.

    Attributes:
        estimate: of the phase.
        passes: of its components.
        floor_s: seconds that it takes at least, where not all of it is known: what its copies take.
        first_token_s: from the start of the phase to the end of its prefill; None where it has none.
        token_s: each token after it.
    """

    estimate: Estimate
    passes: tuple[PassEstimate, ...]
    floor_s: float | None
    first_token_s: float | None = None
    token_s: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseRun:
    """What the engines are given for a phase.

    Attributes:
        rounds: what it computes.
        slowed: the same with what missed experts add to each step; ``rounds`` where none are offloaded.
        stage: where its blocks are.
        switch_s: what bringing in its residents takes; 0 where they are there.
    """

    rounds: tuple[Round, ...]
    slowed: tuple[Round, ...]
    stage: Stage
    switch_s: float


def brought_bytes(draft: Draft, homes: PhaseHomes) -> dict[Tier, int]:
    """Bytes that come from each tier when the phase begins, on one device."""
    brought = dict.fromkeys(Tier, 0)
    brought[homes.fixed] += draft.need.fixed_bytes
    for size, stays, home in zip(draft.need.sizes_bytes, draft.residency.resident, homes.blocks, strict=True):
        if stays:
            brought[home] += size
    return brought


def plain_run(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseRun | None:
    """What the engines are given for a phase on one device; None where something that it needs is not known."""
    residency = draft.residency
    tiers = [Tier.DEVICE if stays else home for stays, home in zip(residency.resident, homes.blocks, strict=True)]
    staging = residency.staging_bytes, residency.slot_bytes
    stage = stage_of(draft.need.sizes_bytes, tiers, staging, setting.rates, setting.in_ram, {})
    switch_s = switch_seconds(brought_bytes(draft, homes), setting.rates, setting.in_ram) if takes_turns else 0.0
    rounds = setting.rounds(draft.need)
    return None if rounds is None or stage is None or switch_s is None else PhaseRun(rounds, rounds, stage, switch_s)


def forecast(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseForecast:
    """What a phase takes.

    Args:
        draft: the phase with its residency.
        homes: where its weights wait.
        setting: on which rates.
        takes_turns: other phases come before and after, so that its weights are brought in anew.
    """
    moved = dict.fromkeys(Tier, 0)
    for size, stays, home in zip(draft.need.sizes_bytes, draft.residency.resident, homes.blocks, strict=True):
        moved[Tier.DEVICE if stays else home] += size
    transfer_s = _transfer_s(moved, setting)
    switch_s = switch_seconds(brought_bytes(draft, homes), setting.rates, setting.in_ram) if takes_turns else 0.0
    floor_s = None if transfer_s is None or switch_s is None else switch_s + draft.need.passes * transfer_s
    return assembled(draft, homes, plain_run(draft, homes, setting, takes_turns), takes_turns, (transfer_s, floor_s))


def assembled(
    draft: Draft, homes: PhaseHomes, run: PhaseRun | None, takes_turns: bool, copies: tuple[float | None, float | None] = (None, None)
) -> PhaseForecast:
    """Run a phase and put its bytes and times together; ``copies`` are what its copies take in a pass, and what it takes at least."""
    transfer_s, floor_s = copies
    pace = None if run is None else pace_of(run.slowed, run.stage, run.switch_s, takes_turns)
    rounds = None if run is None else run.rounds
    passes = _passes(draft, rounds, None if run is None else run.stage, pace)
    main = max(passes, key=lambda p: p.count * (p.pass_s or 0.0), default=None)
    timed = pace is not None and main is not None
    estimate = Estimate(
        **phase_bytes(draft, homes),
        pass_s=main.pass_s if timed and main else None,
        compute_s=main.compute_s if timed and main else None,
        transfer_s=main.transfer_s if timed and main else transfer_s,
        stall_s=main.stall_s if timed and main else None,
        bound_by=main.bound_by if timed and main else None,
        total_s=pace.total_s if pace is not None else None,
    )
    first_token_s, token_s = _answer(rounds, pace)
    return PhaseForecast(estimate, passes, pace.total_s if pace is not None else floor_s, first_token_s, token_s)


def phase_bytes(draft: Draft, homes: PhaseHomes) -> dict[str, int]:
    """The bytes of an estimate."""
    need, residency = draft.need, draft.residency
    held = dict.fromkeys(Tier, 0)
    held[homes.fixed] += need.fixed_bytes
    resident_bytes = streamed_bytes = 0
    for size, stays, home in zip(need.sizes_bytes, residency.resident, homes.blocks, strict=True):
        held[home] += size
        if stays:
            resident_bytes += size
        else:
            streamed_bytes += size
    for (_, block), weight, tier in zip(need.blocks, need.weights, homes.experts, strict=False):
        if tier is not None and block.experts is not None:
            held[tier] += block.experts.count * weight.expert_bytes
    devices = draft.devices
    streaming = len({devices[i] if devices else 0 for i, stays in enumerate(residency.resident) if not stays}) or 1
    computing = len({0, *devices})
    return {
        "device_peak_bytes": need.fixed_bytes
        + resident_bytes
        + streaming * residency.staging_bytes
        + draft.expert_cache_bytes
        + computing * need.activation_bytes,
        "pinned_bytes": held[Tier.PINNED] + homes.ring_bytes,
        "ram_bytes": held[Tier.RAM],
        "disk_bytes": held[Tier.DISK],
        "streamed_bytes": streamed_bytes,
    }


def _passes(draft: Draft, rounds: Sequence[Round] | None, stage: Stage | None, pace: Pace | None) -> tuple[PassEstimate, ...]:
    if rounds is None or stage is None or pace is None:
        found = [
            PassEstimate(component.name, profile.name, profile.count, profile.activation_bytes)
            for component, profiles in zip(draft.need.components, draft.need.profiles, strict=True)
            for profile in profiles
        ]
        return tuple(found)
    return tuple(
        _pass(one, part, part_s, stage)
        for one, times in zip(rounds, pace.rounds, strict=True)
        for part, part_s in zip(one.parts, times.part_s, strict=True)
    )


def _pass(one: Round, part: Part, pass_s: float, stage: Stage) -> PassEstimate:
    slots = {slot for index in part.steps if index >= 0 and (slot := stage.slots_of[index]) is not None}
    moves = [stage.moves[device][k] for device, k in sorted(slots)]
    link_s, disk_s = sum(move.link_s for move in moves), sum(move.disk_s for move in moves)
    return PassEstimate(
        component=part.component,
        name=one.name,
        count=one.count,
        activation_bytes=part.profile.activation_bytes,
        pass_s=pass_s,
        compute_s=part.spent.total_s,
        transfer_s=sum(max(move.link_s, move.disk_s) for move in moves),
        stall_s=max(0.0, pass_s - part.spent.total_s),
        bound_by=bound_by(part, link_s, disk_s),
    )


def bound_by(part: Part, link_s: float, disk_s: float) -> str | None:
    """What works longest in a pass; None where nothing does."""
    longest = max(part.spent.total_s, link_s, disk_s)
    if longest <= 0:
        return None
    if longest == part.spent.total_s:
        return "memory" if 2 * part.spent.memory_s > part.spent.total_s else "compute"
    return "disk" if longest == disk_s else "link"


def _answer(rounds: Sequence[Round] | None, pace: Pace | None) -> tuple[float | None, float | None]:
    first_s = token_s = None
    if rounds is not None and pace is not None:
        for one, times in zip(rounds, pace.rounds, strict=True):
            if one.name == "prefill":
                first_s = times.first_end_s
            if one.name == "token":
                token_s = times.round_s
    return first_s, token_s


def _transfer_s(moved: dict[Tier, int], setting: Setting) -> float | None:
    """Seconds that the copies of one pass take one after the other; None where a rate is not known.

    What comes from disk also crosses the link, but behind a reader that is slower: the disk alone sets its time.
    """
    link_bytes, disk_bytes = moved[Tier.PINNED] + moved[Tier.RAM], moved[Tier.DISK]
    seconds = 0.0
    for nbytes, rate in ((link_bytes, setting.rates.h2d_bytes_per_s), (disk_bytes, setting.rates.disk_bytes_per_s)):
        if nbytes and rate <= 0:
            return None
        seconds += nbytes / rate if nbytes else 0.0
    return seconds


def whole(drafts: Sequence[Draft], parts: Sequence[PhaseForecast], together: bool) -> Estimate:
    """The estimate of all phases; ``together`` where all of them are on the device all the time."""
    phases = [part.estimate for part in parts]
    totals = [phase.total_s for phase in phases if phase.total_s is not None]
    times = [phase.transfer_s for phase in phases if phase.transfer_s is not None]
    timed = [p for part in parts for p in part.passes if p.pass_s is not None] if len(totals) == len(parts) else []
    main = max(timed, key=lambda p: p.count * (p.pass_s or 0.0), default=None)
    first_s = token_s = None
    before_s = 0.0
    if timed:
        for part in parts:
            if part.first_token_s is not None:
                first_s, token_s = before_s + part.first_token_s, part.token_s
            before_s += part.estimate.total_s or 0.0
    peak = together_bytes([draft.need for draft in drafts]) if together else max((p.device_peak_bytes for p in phases), default=0)
    return Estimate(
        device_peak_bytes=peak,
        pinned_bytes=sum(phase.pinned_bytes for phase in phases),
        ram_bytes=sum(phase.ram_bytes for phase in phases),
        disk_bytes=sum(phase.disk_bytes for phase in phases),
        streamed_bytes=sum(phase.streamed_bytes for phase in phases),
        pass_s=main.pass_s if main else None,
        compute_s=main.compute_s if main else None,
        transfer_s=main.transfer_s if main else (sum(times) if len(times) == len(phases) else None),
        stall_s=main.stall_s if main else None,
        bound_by=main.bound_by if main else None,
        total_s=sum(totals) if parts and len(totals) == len(parts) else None,
        first_token_s=first_s,
        token_s=token_s,
    )
