"""How long a phase takes: its rounds run through the simulated engines until they are in their rhythm, the rest by multiplication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from overflowml_core.planner.machinery import Lane, Machinery, Move, Record, State, Step
from overflowml_core.planner.rounds import OUTSIDE, Part, Round
from overflowml_core.planner.turns import Turns

_MOST_PASSES = 32
"""Simulated of each kind at most. Two or three are mostly enough; more where a lead of the copies is used up in small steps."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the blocks of a phase are while it runs.

    Attributes:
        slots_of: per block the (device, streamed index) that it has; None where it is resident.
        moves: per device, of its streamed blocks in order.
        staging_bytes: of the staging buffer of each device, in the unit of the moves.
        devices: per block, the device that computes it.
        handoff_s: what it takes to hand activations on where one step computes on another device than the one before.
        in_ram: the compute tier is RAM, and the disk is all that is outside of it.
    """

    slots_of: tuple[tuple[int, int] | None, ...]
    moves: tuple[tuple[Move, ...], ...]
    staging_bytes: int
    devices: tuple[int, ...] = ()
    handoff_s: float = 0.0
    in_ram: bool = False


@dataclass(frozen=True, slots=True)
class RoundPace:
    """Times of one kind of round, in seconds.

    Attributes:
        first_end_s: when the first one is over, counted from the start of the phase.
        round_s: each one in the rhythm of many.
        part_s: of it, each component's pass.
        link_s, disk_s: what the copy engines and the reader are busy in a round.
    """

    first_end_s: float
    round_s: float
    part_s: tuple[float, ...]
    link_s: float
    disk_s: float


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of a phase, in seconds: all of it, bringing its weights in, and its rounds."""

    total_s: float
    switch_s: float
    rounds: tuple[RoundPace, ...]


def pace_of(rounds: Sequence[Round], stage: Stage, switch_s: float, takes_turns: bool) -> Pace:
    """Run a phase once.

    Args:
        rounds: what it runs.
        stage: where its blocks are.
        switch_s: what bringing in its residents takes; 0 where they are there.
        takes_turns: other phases come before and after: slots are empty at the start, and what was fetched for another pass is waited for
            at the end. Else the slots are full at the start, from the unit of work before.
    """
    if not any(stage.moves):
        return _unhindered(rounds, stage, switch_s)
    runner: Quick | Machinery
    if _is_plain(rounds, stage):
        runner = Quick(stage.moves[0], stage.staging_bytes, switch_s, filled=not takes_turns, in_ram=stage.in_ram)
    else:
        runner = machinery_of(stage, switch_s, takes_turns)
    paces = tuple(_run_round(runner, one, stage) for one in rounds)
    return Pace(runner.drain() if takes_turns else runner.compute_s, switch_s, paces)


def machinery_of(stage: Stage, start_s: float, takes_turns: bool, record: Record | None = None) -> Machinery:
    """The engines when the residents of a phase are in; arguments as for :func:`pace_of` and :class:`Machinery`."""
    lanes = [Lane(moves, stage.staging_bytes) for moves in stage.moves]
    return Machinery(lanes, start_s, filled=not takes_turns, in_ram=stage.in_ram, record=record)


def steps_of(part: Part, stage: Stage) -> list[Step]:
    """One component's pass as the engines take it, with what handing activations on takes as steps outside blocks."""
    steps: list[Step] = []
    device = 0
    for index, seconds in zip(part.steps, part.seconds, strict=True):
        slot = stage.slots_of[index] if index >= 0 else None
        own = stage.devices[index] if stage.devices and index >= 0 else 0
        if own != device and stage.handoff_s:
            steps.append((own, -1, stage.handoff_s, OUTSIDE))
        device = own
        steps.append((device, -1 if slot is None else slot[1], seconds, index))
    return steps


def _unhindered(rounds: Sequence[Round], stage: Stage, switch_s: float) -> Pace:
    end_s = switch_s
    paces = []
    for one in rounds:
        parts = tuple(sum(step[2] for step in steps_of(part, stage)) for part in one.parts) if stage.handoff_s else None
        part_s = parts or tuple(part.spent.total_s for part in one.parts)
        paces.append(RoundPace(end_s + sum(part_s), sum(part_s), part_s, 0.0, 0.0))
        end_s += one.count * sum(part_s)
    return Pace(end_s, switch_s, tuple(paces))


def _is_plain(rounds: Sequence[Round], stage: Stage) -> bool:
    """Whether every round calls every streamed block once and in order, and all of them wait in the same place."""
    if len(stage.moves) != 1 or stage.handoff_s:
        return False
    if not stage.in_ram and any(move.disk_s or move.holds_reader for move in stage.moves[0]):
        return False
    expected = range(len(stage.moves[0]))
    slots = stage.slots_of
    for one in rounds:
        called = [slot[1] for part in one.parts for index in part.steps if index >= 0 and (slot := slots[index]) is not None]
        if len(called) != len(expected) or any(k != c for k, c in zip(expected, called, strict=True)):
            return False
    return True


class Quick:
    """The engines where all blocks come from one place, once in a pass and in order: the same times as :class:`Machinery`, in one loop."""

    def __init__(self, moves: Sequence[Move], staging_bytes: int, start_s: float, *, filled: bool, in_ram: bool) -> None:
        """Fill the staging buffer; ``moves`` are of the streamed blocks, ``staging_bytes`` what the buffer has."""
        self.compute_s = start_s
        self.link_s = self.disk_s = 0.0
        self._copies = [move.disk_s if in_ram else move.link_s for move in moves]
        self._turns = Turns([move.nbytes for move in moves], staging_bytes, in_parts=not in_ram)
        self._pass = 0
        self._in_ram = in_ram
        self._copy_free_s = start_s
        self._ready_s = [start_s] * len(moves)
        if not filled:
            before_s = start_s
            for k, part in self._turns.first:
                self._copy_free_s += self._copies[k] * part
                self._ready_s[k] = self._copy_free_s
            filling_s = self._copy_free_s - before_s
            self.link_s, self.disk_s = (0.0, filling_s) if in_ram else (filling_s, 0.0)

    def run_part(self, part: Part, stage: Stage) -> None:
        """One component's pass."""
        slots_of = stage.slots_of
        slots = [slots_of[index] if index >= 0 else None for index in part.steps]
        copies, ready = self._copies, self._ready_s
        now, copy_free = self.compute_s, self._copy_free_s
        sent_behind = self._turns.of_pass(self._pass)
        last = len(copies) - 1
        busy = 0.0
        for slot, seconds in zip(slots, part.seconds, strict=True):
            if slot is None:
                now += seconds
                continue
            k = slot[1]
            arrived = ready[k]
            now = (arrived if arrived > now else now) + seconds
            for following, share in sent_behind[k]:
                copy_s = copies[following] * share
                copy_free = (copy_free if copy_free > now else now) + copy_s
                busy += copy_s
                ready[following] = copy_free
            if k == last:
                self._pass += 1
        self.compute_s, self._copy_free_s = now, copy_free
        if self._in_ram:
            self.disk_s += busy
        else:
            self.link_s += busy

    def drain(self) -> float:
        """When everything that was started is over."""
        return max(self.compute_s, self._copy_free_s)

    def skip(self, seconds: float) -> None:
        """Let so much time pass in which everything goes on as it does now."""
        self.compute_s += seconds
        self._copy_free_s += seconds
        self._ready_s = [t + seconds for t in self._ready_s]

    def state(self) -> State:
        """How the engines are at the end of a pass. What is over counts as now."""
        now = self.compute_s
        ready = (max(self._ready_s[k], now) for k in self._turns.ahead(self._pass))
        return State((self._turns.place_of(self._pass),), (now, max(self._copy_free_s, now), *ready))


def _run_round(runner: Quick | Machinery, one: Round, stage: Stage) -> RoundPace:
    prepared = [steps_of(part, stage) for part in one.parts] if isinstance(runner, Machinery) else []
    passes: list[_Pass] = []
    states: list[State] = []
    period = 0
    while len(passes) < min(one.count, _MOST_PASSES) and not period:
        passes.append(_run_pass(runner, one, stage, prepared))
        states.append(runner.state())
        period = _period(states)
    # Where no rhythm shows, the later half of them is taken for one.
    rhythm = passes[-(period or (len(passes) + 1) // 2) :]
    round_s = sum(sum(each.part_s) for each in rhythm) / len(rhythm)
    left = one.count - len(passes)
    if left:
        rest = left % len(rhythm)
        runner.skip((left - rest) * round_s)
        for _ in range(rest):
            _run_pass(runner, one, stage, prepared)
    return RoundPace(
        first_end_s=passes[0].end_s,
        round_s=round_s,
        part_s=tuple(sum(part_s) / len(rhythm) for part_s in zip(*(each.part_s for each in rhythm), strict=True)),
        link_s=sum(each.link_s for each in rhythm) / len(rhythm),
        disk_s=sum(each.disk_s for each in rhythm) / len(rhythm),
    )


class _Pass(NamedTuple):
    """Times of one round, in seconds: when it ends, each component's pass, and what the engines are busy."""

    end_s: float
    part_s: tuple[float, ...]
    link_s: float
    disk_s: float


def _run_pass(runner: Quick | Machinery, one: Round, stage: Stage, prepared: Sequence[Sequence[Step]]) -> _Pass:
    ends, link_s, disk_s = [runner.compute_s], runner.link_s, runner.disk_s
    for place, part in enumerate(one.parts):
        if isinstance(runner, Machinery):
            runner.run(prepared[place])
        else:
            runner.run_part(part, stage)
        ends.append(runner.compute_s)
    part_s = tuple(end - begin for begin, end in pairwise(ends))
    return _Pass(runner.compute_s, part_s, runner.link_s - link_s, runner.disk_s - disk_s)


def _period(states: Sequence[State]) -> int:
    """After how many passes the engines are again as they were; 0 where they have not been so far."""
    for back in range(1, len(states)):
        if states[-1].follows(states[-1 - back]):
            return back
    return 0
