"""Which plans a trial runs, and what measured passes teach about the others and about the machine. Runs nothing.

A plan rests on rates. Measured passes replace them: the seconds of each block and the rates of the copies are taken as measured, the phase
is simulated anew, and what is faster then is tried. How far the simulation is from what was measured says how far it is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from overflowml_core.facts import Machine, Network, Tier
from overflowml_core.formats import Format
from overflowml_core.machine import Rates
from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import PassEstimate, PhasePlan, Plan
from overflowml_core.planner.cost import Costs
from overflowml_core.planner.estimates import whole
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.needs import PhaseNeed
from overflowml_core.planner.rebuild import drafts_behind, setting_behind
from overflowml_core.planner.setting import Setting
from overflowml_core.planner.splits import Key, Split, other_splits, split_of
from overflowml_core.planner.stage import rates_of
from overflowml_core.units import format_bytes, format_seconds
from overflowml_core.work import BlockWork, PassProfile, Work

CLOSE = 1.25
"""A trial is worth its passes where the second best plan takes no more than this many times as long as the best."""

MOST_PLANS = 4
"""Plans of a phase that are run in one trial."""

_CLEARLY = 0.03
"""Predicted gains below this are left to whoever plans anew; see judge.NEARLY."""

_TRIED_KINDS = ("stream", "sequential", "phased")


@dataclass(frozen=True, slots=True)
class _Run:
    """A split that was run: how long its pass took, and with that its phase in all."""

    phase: PhasePlan
    pass_s: float
    total_s: float


@dataclass(slots=True)
class _Bout:
    """The trial of one phase. ``component`` is the one whose passes are measured, ``lesson`` the last of them."""

    component: str
    runs: dict[Key, _Run] = field(default_factory=dict)
    lesson: MeasuredPass | None = None
    is_over: bool = False


class Contest:
    """The trial of a plan: told what passes take, it names the plan to run next, until every phase is settled.

    Args:
        plan: what runs now.
        network: what it was made for.
        machine: what it was made on.
        formats: those that the plan uses.
    """

    def __init__(self, plan: Plan, network: Network, machine: Machine, formats: Sequence[Format] = ()) -> None:
        self.plan = plan
        self._network = network
        self._machine = machine
        self._formats = tuple(formats)
        self._bouts = {index: _Bout(_heaviest(phase)) for index, phase in enumerate(plan.phases) if _has_choice(plan, phase)}

    @property
    def components(self) -> frozenset[str]:
        """The components whose passes are still to be measured."""
        return frozenset(bout.component for bout in self._bouts.values() if not bout.is_over)

    @property
    def lessons(self) -> tuple[MeasuredPass, ...]:
        """The last measured pass of each component."""
        return tuple(bout.lesson for bout in self._bouts.values() if bout.lesson is not None)

    def hear(self, measured: MeasuredPass) -> Plan:
        """Take in what a pass of one of ``components`` takes under the present plan.

        Returns:
            The plan to run from now on; the present one where nothing better is known.
        """
        index, bout = next((i, b) for i, b in self._bouts.items() if b.component == measured.component)
        bout.lesson = measured
        setting, drafts, turns = self._taught()
        draft, homes = drafts[index]
        present = split_of(draft, homes, setting, turns)
        expected = _expected(present, measured.component)
        if expected is None or not expected.pass_s or present.total_s is None:
            bout.is_over = True
            return self.plan
        error = abs(expected.pass_s / measured.pass_s - 1) if measured.pass_s > 0 else 0.0
        total_s = present.total_s + expected.count * (measured.pass_s - expected.pass_s)
        bout.runs[present.key] = _Run(self.plan.phases[index], measured.pass_s, total_s)
        best_key = min(bout.runs, key=lambda key: bout.runs[key].total_s)
        others = {split.key: split for split in other_splits(draft, homes, setting, turns)} | {present.key: present}
        best_s = others[best_key].total_s if best_key in others else present.total_s
        # What the simulation gets wrong it may get wrong of the others, too: then they are run, not believed to be slower.
        bar_s = (best_s or present.total_s) * (1 - _CLEARLY + min(error, CLOSE - 1))
        untried = [split for key, split in others.items() if key not in bout.runs and split.total_s is not None and split.total_s <= bar_s]
        if untried and len(bout.runs) < MOST_PLANS:
            following = _phase_with(self.plan.phases[index], min(untried, key=lambda split: split.total_s or 0.0))
        else:
            bout.is_over = True
            following = bout.runs[best_key].phase
        self.plan = self._plan_with(index, following)
        return self.plan

    def close(self) -> Plan:
        """Try nothing more.

        Returns:
            The plan whose phases were the fastest of those that were run.
        """
        for index, bout in self._bouts.items():
            bout.is_over = True
            if bout.runs:
                best = min(bout.runs.values(), key=lambda run: run.total_s)
                self.plan = self._plan_with(index, best.phase)
        return self.plan

    def refuse(self, plan: Plan) -> None:
        """Say that the plan named last could not be carried out, and which one runs; nothing more is tried."""
        self.plan = plan
        for bout in self._bouts.values():
            bout.is_over = True

    @property
    def pass_s(self) -> float | None:
        """Seconds of a pass under the present plan as they were measured, of the phase that takes longest; None where nothing was."""
        present = {index: (phase.placements, phase.staging_bytes) for index, phase in enumerate(self.plan.phases)}
        runs = [
            r for i, bout in self._bouts.items() for r in bout.runs.values() if (r.phase.placements, r.phase.staging_bytes) == present[i]
        ]
        return max(runs, key=lambda run: run.total_s).pass_s if runs else None

    def sentences(self) -> tuple[str, ...]:
        """What was tried and what was kept, for people."""
        return tuple(_told(self.plan.phases[index], bout) for index, bout in self._bouts.items() if bout.runs)

    # ---- what was measured, in place of what was reckoned

    def _taught(self) -> tuple[Setting, list[tuple[Draft, PhaseHomes]], bool]:
        """The setting with measured rates, and the phases of the plan with measured blocks."""
        seconds: dict[str, float] = {}
        drafts = drafts_behind(self.plan, self._network, self._formats)
        rates = with_measured_links(rates_of(self._machine), self.lessons)
        for index, bout in self._bouts.items():
            if bout.lesson is not None:
                draft, homes = drafts[index]
                drafts[index] = replace(draft, need=_taught_need(draft.need, bout.lesson, Costs(rates), seconds)), homes
        rates = replace(rates, source="measured", op_seconds=(*rates.op_seconds, *seconds.items()))
        setting = setting_behind(self.plan, self._network, _with_rates(self._machine, rates))
        setting.budget = self.plan.budget
        return setting, drafts, self.plan.takes_turns and len(self.plan.phases) > 1

    def _plan_with(self, index: int, phase: PhasePlan) -> Plan:
        phases = (*self.plan.phases[:index], phase, *self.plan.phases[index + 1 :])
        kind = "stream" if any(one.streamed for one in phases) else "phased"
        form = self.plan.strategy.partition(" ")[2]
        plan = replace(self.plan, strategy=f"{kind} {form}".rstrip(), phases=phases, fingerprint="")
        self.plan = plan
        setting, drafts, turns = self._taught()
        parts = [split_of(draft, homes, setting, turns).forecast for draft, homes in drafts]
        phases = tuple(replace(one, estimate=p.estimate, passes=p.passes) for one, p in zip(phases, parts, strict=True))
        told = (*setting.budget_reasons, *self.sentences())
        rates = replace(setting.rates, op_seconds=())
        return replace(plan, phases=phases, estimate=whole([d for d, _ in drafts], parts, False), reasons=told, rates=rates).check()


def is_close(plan: Plan, network: Network, machine: Machine, formats: Sequence[Format] = ()) -> bool:
    """Whether another plan takes at most ``CLOSE`` times as long as this one, by the rates that are known. False where times are not."""
    setting = setting_behind(plan, network, machine)
    setting.budget = plan.budget
    turns = plan.takes_turns and len(plan.phases) > 1
    totals = [
        (split_of(draft, homes, setting, turns).total_s, [s.total_s for s in other_splits(draft, homes, setting, turns)])
        for phase, (draft, homes) in zip(plan.phases, drafts_behind(plan, network, formats), strict=True)
        if _has_choice(plan, phase)
    ]
    return any(own is not None and any(other is not None and other <= own * CLOSE for other in others) for own, others in totals)


# ---- rates


_SMALLEST_CHANGE, _LEAST, _MOST = 0.03, 0.2, 5.0
"""A correction of less is noise; a rate is never taken for less or more than so many times what it was measured to be before."""

_BOUND = 0.1
"""Of a pass: with less of it spent on waiting, computing sets its time."""


def with_measured_links(rates: Rates, lessons: Sequence[MeasuredPass]) -> Rates:
    """The rates with those of copies and reads as they were measured, the slowest where several passes were."""
    for name in ("h2d_bytes_per_s", "pageable_h2d_bytes_per_s", "disk_bytes_per_s"):
        found = [getattr(lesson, name) for lesson in lessons if getattr(lesson, name) > 0]
        if found:
            rates = replace(rates, **{name: min(found)})
    return rates


def corrected(rates: Rates, network: Network, lessons: Sequence[MeasuredPass]) -> Rates:
    """Calibrated rates after a trial: copies and reads as they were measured, operations of the network where computing set the time.

    Args:
        rates: of the device, measured.
        network: whose profiled passes ran. What they compute is held against what was measured, so they must have had the shapes of the
            profile; pass one without profiles where nobody knows that.
        lessons: what was measured.

    Returns:
        The same rates where nothing changed by more than noise.
    """
    measured = with_measured_links(rates, lessons)
    for name in ("h2d_bytes_per_s", "pageable_h2d_bytes_per_s", "disk_bytes_per_s"):
        before, after = getattr(rates, name), getattr(measured, name)
        if before > 0 and abs(after / before - 1) > _SMALLEST_CHANGE:
            rates = replace(rates, **{name: before * _bounded(after / before)})
    known = dict(rates.op_seconds)
    for lesson in lessons:
        component = next((c for c in network.components if c.name == lesson.component), None)
        profile = _main(component.profiles) if component is not None else None
        if profile is None or lesson.stall_s > _BOUND * lesson.pass_s:
            continue
        works = [work for block in profile.blocks for work in block.works if work.signature in known]
        reckoned_s = sum(known[work.signature] * work.calls for work in works)
        factor = _bounded(sum(block.compute_s for block in lesson.blocks) / reckoned_s) if reckoned_s > 0 else 1.0
        if len(works) == sum(len(block.works) for block in profile.blocks) and abs(factor - 1) > _SMALLEST_CHANGE:
            known.update({signature: known[signature] * factor for signature in {work.signature for work in works}})
    return rates if known == dict(rates.op_seconds) else replace(rates, op_seconds=tuple(known.items()))


def _bounded(factor: float) -> float:
    return min(max(factor, _LEAST), _MOST)


def _with_rates(machine: Machine, rates: Rates) -> Machine:
    first = tuple(replace(one, rates=rates) for one in machine.accelerators[:1])
    return replace(machine, accelerators=(*first, *machine.accelerators[1:]), rates=rates)


# ---- phases


def _has_choice(plan: Plan, phase: PhasePlan) -> bool:
    """Whether blocks of a phase could be elsewhere: where it streams, and where it shares the device in turn."""
    whole_blocks = [p for p in phase.placements if p.stored_bytes]
    movable = len(whole_blocks) > 1 and phase.devices == (0,) and not phase.expert_cache_bytes
    return movable and plan.kind in _TRIED_KINDS and bool(phase.streamed or len(plan.phases) > 1)


def _heaviest(phase: PhasePlan) -> str:
    held = {name: sum(p.stored_bytes for p in phase.placements if p.component == name) for name in phase.components}
    return max(held, key=lambda name: held[name])


def _main(profiles: Sequence[PassProfile]) -> PassProfile | None:
    """The pass that repeats, which is the one that a trial measures: a token, not the prefill before it."""
    return max(profiles, key=lambda profile: profile.count, default=None)


def _taught_need(need: PhaseNeed, lesson: MeasuredPass, costs: Costs, seconds: dict[str, float]) -> PhaseNeed:
    """The phase with the measured pass in place of the profiled one; its seconds by signature are put into ``seconds``. Passes of which
    nobody knows how long they compute are left out, for they would leave the phase without times."""
    place = next(i for i, component in enumerate(need.components) if component.name == lesson.component)
    component, profiles = need.components[place], need.profiles[place]
    by_name = {block.block: block for block in lesson.blocks}
    known = _main(profiles)
    base = known or PassProfile("pass", max(1, component.passes), component.activation_bytes)
    blocks = []
    for name, block in need.blocks:
        if name != lesson.component:
            continue
        time = by_name.get(block.name)
        works = () if time is None else (_timed_work(f"trial {name}.{block.name}", time.compute_s, seconds),)
        blocks.append(BlockWork(works, 0, 0 if time is None else time.calls))
    outside = (_timed_work(f"trial {lesson.component}", lesson.outside_s, seconds),)
    taught = replace(base, blocks=tuple(blocks), outside=outside)
    mine = tuple(taught if p is known else p for p in profiles if p is known or _is_timed(p, costs)) or (taught,)
    return replace(need, profiles=(*need.profiles[:place], mine, *need.profiles[place + 1 :]))


def _is_timed(profile: PassProfile, costs: Costs) -> bool:
    says_something = bool(profile.outside) or any(block.works for block in profile.blocks)
    return says_something and None not in [costs.seconds(works) for works in (profile.outside, *(b.works for b in profile.blocks))]


def _timed_work(signature: str, compute_s: float, seconds: dict[str, float]) -> Work:
    seconds[signature] = compute_s
    return Work("memory", "U8", 0, 0, 0, 1, signature)


def _expected(split: Split, component: str) -> PassEstimate | None:
    own = [one for one in split.forecast.passes if one.component == component]
    return max(own, key=lambda one: one.count, default=None)


def _phase_with(phase: PhasePlan, split: Split) -> PhasePlan:
    residency = split.draft.residency
    placements = tuple(
        replace(place, tier=Tier.DEVICE if stays else home, home=home)
        for place, stays, home in zip(phase.placements, residency.resident, split.homes.blocks, strict=True)
    )
    return replace(phase, placements=placements, staging_bytes=residency.staging_bytes, slot_bytes=residency.slot_bytes)


def _told(phase: PhasePlan, bout: _Bout) -> str:
    def words(run: _Run) -> str:
        kept = sum(p.tier is Tier.DEVICE for p in run.phase.placements)
        blocks = f"{kept} of {len(run.phase.placements)} blocks resident"
        return f"{format_seconds(run.pass_s)} a pass with {blocks} and {format_bytes(run.phase.staging_bytes)} of staging"

    present = (tuple(p.tier is Tier.DEVICE for p in phase.placements), phase.staging_bytes)
    runs = list(bout.runs.items())
    kept = "; ".join(words(run) for key, run in runs if key == present)
    others = "; ".join(words(run) for key, run in runs if key != present)
    told = f"{bout.component}: measured, {kept or 'a new plan is being tried'}"
    return f"{told}; also tried: {others}" if others else told
