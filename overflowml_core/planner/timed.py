"""Which blocks of a phase stay, where it is known what they compute: the choice whose simulated time is the least.

Small phases are enumerated, so that the choice is the optimum of the model. Larger ones take the best of several ways to fill the room,
then exchanges between blocks, then changes at random, within a bound on simulated steps that does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, cycle, islice, pairwise, product
from math import exp
from random import Random

from overflowml_core.planner.machinery import Move
from overflowml_core.planner.pace import Stage, pace_of
from overflowml_core.planner.residency import Residency, choose
from overflowml_core.planner.rounds import Round
from overflowml_core.staging import fitting

MOST_ENUMERATED = 7
"""Blocks of a phase up to which every residency and every size of the staging buffer is tried."""

_MOST_STEPS = 200_000
"""Simulated steps of one phase, beyond which no further choice is looked at; about 0.1 s."""

_EXCHANGED_STEPS = 100_000
"""Of them, those up to which exchanges are looked at; the rest is for changes at random."""

_SHAKES = 2_000
"""Changes at random, most of which do not fit or are known to be slower."""

_HEAT = 0.02
"""How much slower, as a part of the whole, a change at random may make a choice at first: about what one block more or less does."""

_MOST_SLOTS = 4
"""Of the largest streamed block, what a staging buffer holds at most. Deeper prefetch gained less than 1 % where it was measured (sglang PR
31538: 0.9 % for a depth of 16 instead of 1)."""

_FILLED_SLOTS = (2, 3, _MOST_SLOTS, 1.5, 1)
"""Of the largest streamed block, what is kept for staging when the room is filled with residents."""

_FEW = 16
"""Blocks up to which three are exchanged at once: 560 changes to look at."""

_EIGHTHS = 8
"""Parts of a phase's bytes that are tried as its room where every resident must be brought in anew."""

_MANY = 40
"""Blocks of a phase of which one is little: the choice with the fewest bytes is good enough where its copies set the time."""

_ENOUGH = 1 + 1e-3
"""A choice so close to what no choice can beat is not improved any further."""

_ALMOST = 1.005
"""A choice so close to it is not looked for at random."""

_CLEARLY = 1 - 1e-9


@dataclass(slots=True)
class Problem:
    """A phase whose residents are to be chosen.

    Attributes:
        sizes_bytes: per block in order of execution; 0 where it is tied to another.
        owners: per block the index of the block whose tensors it uses.
        room_bytes: what blocks and slots may take together.
        rounds: what it runs.
        moves: per block, how it comes to a slot.
        bring_s: per block, what bringing it in costs when the phase begins and it is resident; 0 where the phase never leaves.
        fixed_s: the same for the weights outside blocks.
        takes_turns: other phases come before and after.
        in_ram: the compute tier is RAM.
        steps: simulated so far.
        whole: indices of the blocks that take bytes of their own.
    """

    sizes_bytes: Sequence[int]
    owners: Sequence[int]
    room_bytes: int
    rounds: Sequence[Round]
    moves: Sequence[Move]
    bring_s: Sequence[float]
    fixed_s: float
    takes_turns: bool
    in_ram: bool
    steps: int = 0
    whole: tuple[int, ...] = ()
    _row: int = 0
    _tried: dict[tuple[tuple[bool, ...], int], float] = field(default_factory=dict)
    _called: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    _is_regular: bool = False

    def __post_init__(self) -> None:
        self.whole = tuple(index for index, size in enumerate(self.sizes_bytes) if size)
        self._row = sum(len(part.steps) for one in self.rounds for part in one.parts)
        for index in self.whole:
            self._called[index] = []
        for one in self.rounds:
            for part in one.parts:
                for index, seconds in zip(part.steps, part.seconds, strict=True):
                    if index >= 0:
                        self._called[index].append((one.count, seconds))
        self._is_regular = all(len(called) == len(self.rounds) for called in self._called.values())

    def seconds(self, stays: Sequence[bool], staging_bytes: int) -> float:
        """The phase with this choice, simulated."""
        key = (tuple(stays), staging_bytes)
        if key not in self._tried:
            slots_of: list[tuple[int, int] | None] = [None] * len(stays)
            moves: list[Move] = []
            for index in self.whole:
                if not stays[index]:
                    slots_of[index] = (0, len(moves))
                    moves.append(self.moves[index])
            switch_s = self.fixed_s + sum(self.bring_s[index] for index in self.whole if stays[index])
            stage = Stage(tuple(slots_of), (tuple(moves),), staging_bytes, in_ram=self.in_ram)
            self._tried[key] = pace_of(self.rounds, stage, switch_s, self.takes_turns).total_s
            self.steps += 4 * self._row
        return self._tried[key]

    def copies_s(self, stays: Sequence[bool]) -> float:
        """What all copies of the phase take one after the other, and bringing in its residents."""
        moved_s = sum(max(self.moves[i].link_s, self.moves[i].disk_s) for i in self.whole if not stays[i])
        return self.fixed_s + sum(self.bring_s[i] for i in self.whole if stays[i]) + sum(one.count for one in self.rounds) * moved_s

    def floor_s(self, stays: Sequence[bool], staging_bytes: int) -> float:
        """What the phase with this choice takes at least: all its computing, or all copies but those of what the buffer can hold over, and
        while a block computes for longer than the rest of the buffer takes to be filled, nothing is copied."""
        compute_s = sum(one.count * one.compute_s for one in self.rounds)
        switch_s = self.fixed_s + sum(self.bring_s[index] for index in self.whole if stays[index])
        copies_s = idle_s = most_s_per_byte = 0.0
        streamed = [index for index in self.whole if not stays[index]]
        for index in streamed:
            copy_s = max(self.moves[index].link_s, self.moves[index].disk_s)
            most_s_per_byte = max(most_s_per_byte, copy_s / self.sizes_bytes[index])
            copies_s += copy_s
        if not self._is_regular:
            rest_s = max(copies_s - staging_bytes * most_s_per_byte, 0.0)
            return switch_s + max(compute_s, sum(one.count for one in self.rounds) * rest_s)
        for index in streamed:
            filled_s = (staging_bytes - self.sizes_bytes[index]) * most_s_per_byte
            idle_s += sum(count * (seconds - filled_s) for count, seconds in self._called[index] if seconds > filled_s)
        held_s = staging_bytes * most_s_per_byte
        return switch_s + max(compute_s, sum(one.count for one in self.rounds) * copies_s + idle_s - held_s)

    def staging_bytes(self, stays: Sequence[bool], slots: int = _MOST_SLOTS) -> int:
        """The staging buffer of a choice: what its residents leave, no more than consecutive streamed blocks take nor than so many of the
        largest; 0 where that is too little. One that holds all streamed blocks would be residency by another name."""
        kept = sum(size for size, stay in zip(self.sizes_bytes, stays, strict=True) if stay)
        sizes = [self.sizes_bytes[index] for index in self.whole if not stays[index]]
        return fitting(sizes, min(self.room_bytes - kept, slots * max(sizes), sum(sizes) - 1)) if sizes else 0

    def finished(self, stays: Sequence[bool], staging_bytes: int) -> Residency:
        """The choice with tied blocks beside their owners."""
        resident = tuple(stays[owner] for owner in self.owners)
        streamed = [self.sizes_bytes[index] for index in self.whole if not stays[index]]
        return Residency(resident, staging_bytes if streamed else 0, max(streamed, default=0))


@dataclass(frozen=True, slots=True, order=True)
class _Way:
    """A choice with what it takes: seconds, then bytes streamed, then staging; less is better."""

    seconds: float
    streamed_bytes: int
    staging_bytes: int
    stays: tuple[bool, ...]


def choose_timed(problem: Problem) -> Residency | None:
    """Choose the resident blocks of a phase by its simulated time.

    Of equally fast choices the one that streams the fewest bytes is taken, then the one with the smallest staging buffer.

    Returns:
        None where not even one slot for the largest block fits.
    """
    everything = (True,) * len(problem.sizes_bytes)
    if sum(problem.sizes_bytes) <= problem.room_bytes and not problem.takes_turns:
        return problem.finished(everything, 0)
    exact = len(problem.whole) <= MOST_ENUMERATED
    least_s = sum(one.count * one.compute_s for one in problem.rounds) + problem.fixed_s
    found: list[_Way] = []
    for stays, staging_bytes in _all_ways(problem) if exact else _some_ways(problem):
        if found and not exact:
            # The first way streams the fewest bytes. Its copies are no strict bound, for less staging may leave room for one block more;
            # among many blocks that is little.
            fewest_s = problem.copies_s(found[0].stays) if len(problem.whole) > _MANY else 0.0
            enough_s = max(least_s, fewest_s) * _ENOUGH
            if problem.steps > _MOST_STEPS or min(found).seconds <= enough_s:
                return _finished(problem, found)
        if exact and found and problem.floor_s(stays, staging_bytes) > min(found).seconds:
            continue
        found.append(_way(problem, stays, staging_bytes))
        if exact:
            found = [_better(found)]
    if not found:
        return None
    if not exact:
        found.append(_exchanged(problem, min(found)))
        if min(found).seconds > max(least_s, problem.copies_s(found[0].stays)) * _ALMOST:
            found.append(_shaken(problem, min(found)))
    return _finished(problem, found)


def _way(problem: Problem, stays: Sequence[bool], staging_bytes: int) -> _Way:
    streamed_bytes = sum(size for size, stay in zip(problem.sizes_bytes, stays, strict=True) if not stay)
    return _Way(problem.seconds(stays, staging_bytes), streamed_bytes, staging_bytes, tuple(stays))


def _better(found: Sequence[_Way]) -> _Way:
    """The best of all ways, of which two that differ by rounding alone are equally fast."""
    least_s = min(way.seconds for way in found)
    return min((way for way in found if way.seconds * _CLEARLY <= least_s), key=lambda way: (way.streamed_bytes, way.staging_bytes))


def _finished(problem: Problem, found: Sequence[_Way]) -> Residency:
    best = _better(found)
    return problem.finished(best.stays, best.staging_bytes)


def _all_ways(problem: Problem) -> Iterator[tuple[tuple[bool, ...], int]]:
    whole = problem.whole
    for flags in product((True, False), repeat=len(whole)):
        stays = [True] * len(problem.sizes_bytes)
        for index, flag in zip(whole, flags, strict=True):
            stays[index] = flag
        kept = sum(size for size, stay in zip(problem.sizes_bytes, stays, strict=True) if stay)
        sizes = [problem.sizes_bytes[index] for index in whole if not stays[index]]
        if sizes:
            yield from ((tuple(stays), staging_bytes) for staging_bytes in _stagings(sizes, problem.room_bytes - kept))
        elif kept <= problem.room_bytes:
            yield tuple(stays), 0


def _stagings(sizes_bytes: Sequence[int], room_bytes: int) -> list[int]:
    """Staging buffers of different use: blocks come to lie otherwise only where one more fits in front of the end."""
    most = min(room_bytes, sum(sizes_bytes) - 1)
    sums = {
        sum(islice(cycle(sizes_bytes), first, last)) for first in range(len(sizes_bytes)) for last in range(first, first + len(sizes_bytes))
    }
    return [total for total in sorted(sums) if max(sizes_bytes) <= total <= most]


def _some_ways(problem: Problem) -> Iterator[tuple[tuple[bool, ...], int]]:
    """Ways to fill the room, the most promising first: the most bytes, spread evenly; then by other orders, with more or less staging."""
    most = choose(problem.sizes_bytes, problem.owners, problem.room_bytes)
    if most is None:
        return
    if most.staging_bytes == 0:
        yield (True,) * len(problem.sizes_bytes), 0
    else:
        stays = _owned(problem, most.resident)
        yield stays, problem.staging_bytes(stays) or most.staging_bytes
    for slots in _FILLED_SLOTS:
        for order in _orders(problem):
            filled = _filled(problem, order, slots, problem.room_bytes)
            if filled is not None:
                yield filled, problem.staging_bytes(filled)
    if problem.takes_turns:
        # Residents come in before anything computes and streamed blocks while others do, so that less than fits may be better. These
        # rooms do not depend on the budget: a larger one tries what a smaller one tried.
        scattered = next(_orders(problem))
        for eighth in range(_EIGHTHS - 1, 0, -1):
            filled = _filled(problem, scattered, 2, min(problem.room_bytes, sum(problem.sizes_bytes) * eighth // _EIGHTHS))
            if filled is not None:
                yield filled, problem.staging_bytes(filled, 2)
    nothing = tuple(not size for size in problem.sizes_bytes)
    for slots in (2, 3, _MOST_SLOTS, 1):
        staging_bytes = problem.staging_bytes(nothing, slots)
        if staging_bytes:
            yield nothing, staging_bytes


def _owned(problem: Problem, resident: Sequence[bool]) -> tuple[bool, ...]:
    return tuple(stay or not size for size, stay in zip(problem.sizes_bytes, resident, strict=True))


def _orders(problem: Problem) -> Iterator[list[int]]:
    """Orders in which blocks may be kept: evenly along the row at any length, those whose copies hide least, the first ones, the
    smallest ones, of which the most fit beside a slot for the largest."""
    whole = problem.whole
    yield [whole[i] for i in _scattered(len(whole))]
    computed = dict.fromkeys(whole, 0.0)
    for part in problem.rounds[-1].parts if problem.rounds else ():
        for index, seconds in zip(part.steps, part.seconds, strict=True):
            if index in computed:
                computed[index] += seconds
    yield sorted(whole, key=lambda i: (computed[i] - problem.moves[i].link_s - problem.moves[i].disk_s, i))
    yield list(whole)
    yield sorted(whole, key=lambda i: (problem.sizes_bytes[i], i))


def _scattered(count: int) -> list[int]:
    """Indices in van der Corput's order, of which every beginning is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    mirrored = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [index for index in mirrored if index < count]


def _filled(problem: Problem, order: Sequence[int], slots: float, room_bytes: int) -> tuple[bool, ...] | None:
    """Keep blocks in an order while a room holds them beside so many slots for the largest of the rest."""
    sizes = problem.sizes_bytes
    by_size = sorted(problem.whole, key=lambda i: -sizes[i])
    stays = [not size for size in sizes]
    kept_bytes = largest = left = 0
    left = len(by_size)
    for index in order:
        if left <= slots + 1:
            break
        stays[index] = True
        after = largest
        while after < len(by_size) and stays[by_size[after]]:
            after += 1
        if kept_bytes + sizes[index] + slots * sizes[by_size[after]] <= room_bytes:
            kept_bytes += sizes[index]
            largest = after
            left -= 1
        else:
            stays[index] = False
    return tuple(stays) if left > slots and problem.staging_bytes(stays) else None


def _exchanged(problem: Problem, way: _Way) -> _Way:
    """Change a choice step by step while that is faster and steps are left."""
    improved = True
    while improved and problem.steps <= _EXCHANGED_STEPS:
        improved = False
        for stays, slots in _changes(problem, way):
            if problem.steps > _EXCHANGED_STEPS:
                break
            other = _changed(problem, stays, slots, way.seconds)
            if other is not None and other.seconds < way.seconds * _CLEARLY:
                way, improved = other, True
                break
    return way


def _changed(problem: Problem, stays: Sequence[bool], slots: int, most_s: float) -> _Way | None:
    """A choice with what it takes; None where it does not fit or is known to take longer."""
    problem.steps += len(stays)  # looking at a change costs about as much as simulating so many steps
    staging_bytes = problem.staging_bytes(stays, slots)
    if not staging_bytes or problem.floor_s(stays, staging_bytes) >= most_s:
        return None
    return _way(problem, stays, staging_bytes)


def _changes(problem: Problem, way: _Way) -> Iterator[tuple[list[bool], int]]:
    """Less staging, one block more or less, and one block for another, neighbours first; of few blocks three at once."""
    for slots in range(_MOST_SLOTS - 1, 0, -1):
        yield list(way.stays), slots
    singles = [(index,) for index in problem.whole]
    # Where a block is much of the whole, one that goes makes room for two; among many blocks, exchanges of two get there step by step.
    triples = combinations(problem.whole, 3) if len(problem.whole) <= _FEW else ()
    for change in chain(singles, pairwise(problem.whole), combinations(problem.whole, 2), triples):
        if len(change) > 1 and len({way.stays[index] for index in change}) == 1:
            continue
        stays = list(way.stays)
        for index in change:
            stays[index] = not stays[index]
        yield stays, _MOST_SLOTS


def _shaken(problem: Problem, way: _Way) -> _Way:
    """Change a choice at random while steps are left, at first for the worse too: exchanges alone may be stuck. Always the same changes."""
    draw, present, best = Random(0), way, way
    for number in range(_SHAKES):
        if problem.steps > _MOST_STEPS:
            break
        stays = list(present.stays)
        for index in draw.sample(problem.whole, draw.randint(1, 3)):
            stays[index] = not stays[index]
        heat_s = _HEAT * way.seconds * (1 - max(number / _SHAKES, problem.steps / _MOST_STEPS))
        other = _changed(problem, stays, _MOST_SLOTS, present.seconds + 3 * heat_s)
        if other is None:
            continue
        if other.seconds <= present.seconds or (heat_s > 0 and draw.random() < exp((present.seconds - other.seconds) / heat_s)):
            present = other
            best = min(best, present)
    return best
