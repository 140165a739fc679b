"""A plan as it will run: which engine works on what, when, and how much of the device is taken. For people who look at plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from overflowml_core.facts import Machine, Network
from overflowml_core.formats import Format
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.planner.devices import costs_of, split_run
from overflowml_core.planner.estimates import PhaseRun, plain_run
from overflowml_core.planner.expert_pace import expert_run
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.machinery import Step
from overflowml_core.planner.pace import machinery_of, steps_of
from overflowml_core.planner.rebuild import drafts_behind, setting_behind
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.setting import Setting

SHOWN_PASSES = 2
"""Passes of each kind that are drawn; the rest is a number."""


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of work of one engine.

    Attributes:
        engine: "compute", "link" (copies to the device), "disk", or "cpu" (experts that are computed where they wait).
        device: index of the accelerator.
        component: what it is for.
        block: name of the block; empty for work outside blocks, "residents" for what is brought in when a phase begins.
        start_s, end_s: on the drawn time axis.
    """

    engine: str
    device: int
    component: str
    block: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes of the compute tier that are taken from a moment on, all accelerators together."""

    time_s: float
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Section:
    """Passes of one kind on the time axis.

    Attributes:
        phase, name: which ("transformer", "denoise").
        start_s, end_s: of those that are drawn.
        shown, more: how many are drawn, and how many follow that are not.
        pass_s: each of these.
    """

    phase: str
    name: str
    start_s: float
    end_s: float
    shown: int
    more: int
    pass_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A whole unit of work, of which passes that repeat are drawn only twice.

    Attributes:
        events: in order of their beginning.
        memory: in order of time; each holds until the next.
        sections: the kinds of passes, in order.
        drawn_s: length of the drawn time axis.
        total_s: length of the unit of work.
        budget_bytes: of the compute tier.
        unknown: phases whose times nobody knows; they are not drawn.
    """

    events: tuple[Event, ...]
    memory: tuple[Sample, ...]
    sections: tuple[Section, ...]
    drawn_s: float
    total_s: float | None
    budget_bytes: int
    unknown: tuple[str, ...] = ()


def timeline_of(plan: Plan, network: Network, machine: Machine, formats: Sequence[Format] = ()) -> Timeline:
    """Simulate a plan for one unit of work.

    Args:
        plan: what was decided; times come from the network's profiles and the machine's rates, not from the plan's estimates.
        network: what it was decided for.
        machine: what it runs on.
        formats: those that the plan uses, for what decoding takes.

    Raises:
        PlanMismatch: the plan was made for another network.
    """
    drawing = _Drawing(plan)
    setting = setting_behind(plan, network, machine)
    takes_turns = plan.takes_turns and len(plan.phases) > 1
    for phase, (draft, homes) in zip(plan.phases, drafts_behind(plan, network, formats), strict=True):
        run = _run_of(draft, homes, setting, takes_turns)
        if run is None:
            drawing.unknown.append(phase.name)
        else:
            drawing.phase(phase, draft, run, takes_turns)
    events = tuple(sorted(drawing.events, key=lambda e: (e.start_s, e.end_s, e.engine)))
    return Timeline(
        events=events,
        memory=tuple(drawing.memory),
        sections=tuple(drawing.sections),
        drawn_s=max((e.end_s for e in events), default=0.0),
        total_s=None if drawing.unknown else plan.estimate.total_s,
        budget_bytes=plan.budget.device_bytes,
        unknown=tuple(drawing.unknown),
    )


def _run_of(draft: Draft, homes: PhaseHomes, setting: Setting, takes_turns: bool) -> PhaseRun | None:
    if draft.expert_cache_bytes:
        return expert_run(draft, homes, setting, takes_turns)
    if draft.devices:
        return split_run(draft, homes, setting, costs_of(setting), takes_turns)
    return plain_run(draft, homes, setting, takes_turns)


@dataclass(slots=True)
class _Drawing:
    """A timeline under construction."""

    plan: Plan
    now_s: float = 0.0
    events: list[Event] = field(default_factory=list)
    memory: list[Sample] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)
    _part: Part | None = None

    def phase(self, phase: PhasePlan, draft: Draft, run: PhaseRun, takes_turns: bool) -> None:
        """Draw one phase behind those that were drawn."""
        blocks = draft.need.blocks
        streamed = {slot: index for index, slot in enumerate(run.stage.slots_of) if slot is not None}
        held_bytes = self._held_bytes(phase)
        self.memory.append(Sample(self.now_s, held_bytes))
        if run.switch_s:
            self.events.append(Event("link", 0, phase.components[0], "residents", self.now_s, self.now_s + run.switch_s))

        def record(engine: str, device: int, number: int, start_s: float, end_s: float) -> None:
            index = self._steps[number][3] if engine == "compute" else streamed[device, number]
            component, block = (blocks[index][0], blocks[index][1].name) if index >= 0 else (self._part.component if self._part else "", "")
            self.events.append(Event(engine, device, component, block, start_s, end_s))

        machinery = machinery_of(run.stage, self.now_s + run.switch_s, takes_turns, record)
        for one, slow in zip(run.rounds, run.slowed, strict=True):
            start_s = machinery.compute_s
            shown = min(one.count, SHOWN_PASSES)
            for _ in range(shown):
                for part, slow_part in zip(one.parts, slow.parts, strict=True):
                    self._part, self._steps = part, steps_of(slow_part, run.stage)
                    first = len(self.events)
                    self._sample(machinery.compute_s, held_bytes, part, phase)
                    machinery.run(self._steps)
                    self.memory.append(Sample(machinery.compute_s, held_bytes))
                    if slow_part is not part:
                        self._tell_misses(first, part, self._copies(phase, one))
            pass_s = self._pass_s(phase, one)
            self.sections.append(Section(phase.name, one.name, start_s, machinery.compute_s, shown, one.count - shown, pass_s))
        self.now_s = machinery.drain() if takes_turns else machinery.compute_s

    def _held_bytes(self, phase: PhasePlan) -> int:
        """What is taken while nothing computes: a direct plan holds the weights of all phases all the time."""
        if self.plan.takes_turns:
            return phase.device_bytes - len(phase.devices) * phase.activation_bytes
        return sum(other.device_bytes - other.activation_bytes for other in self.plan.phases)

    def _sample(self, time_s: float, held_bytes: int, part: Part, phase: PhasePlan) -> None:
        nbytes = min(part.profile.activation_bytes, phase.activation_bytes)
        self.memory.append(Sample(time_s, held_bytes + len(phase.devices) * nbytes))

    def _pass_s(self, phase: PhasePlan, one: Round) -> float:
        return sum(p.pass_s or 0.0 for p in phase.passes if p.name == one.name and p.count == one.count)

    def _copies(self, phase: PhasePlan, one: Round) -> bool:
        return any(p.transfer_s for p in phase.passes if p.name == one.name and p.count == one.count)

    def _tell_misses(self, first: int, part: Part, copies: bool) -> None:
        """Cut the steps of a pass into what they compute and what they wait for experts."""
        drawn, self.events[first:] = self.events[first:], []
        # Steps that take no time leave no event.
        own_s = [own for own, (_, _, seconds, _) in zip(part.seconds, self._steps, strict=True) if seconds]
        for event, seconds in zip(drawn, own_s, strict=True):
            end_s = min(event.end_s, event.start_s + seconds)
            if end_s > event.start_s:
                self.events.append(replace(event, end_s=end_s))
            if event.end_s > end_s:
                self.events.append(replace(event, engine="link" if copies else "cpu", start_s=end_s))
