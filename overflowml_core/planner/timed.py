"""Which blocks of a phase stay, where it is known what they compute: the choice whose simulated time is the least.

Small phases are enumerated, so that the choice is the optimum of the model. Larger ones take the best of several ways to fill the room,
then exchanges between blocks, then changes at random, within a bound on simulated steps that does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise, product
from math import exp
from random import Random

from overflowml_core.planner.machinery import Move
from overflowml_core.planner.pace import Stage, pace_of
from overflowml_core.planner.residency import Residency, choose
from overflowml_core.planner.rounds import Round

MOST_ENUMERATED = 7
"""Blocks of a phase up to which every residency and every number of slots is tried."""

_MOST_STEPS = 300_000
"""Simulated steps of one phase, beyond which no further choice is looked at; about 0.1 s."""

_EXCHANGED_STEPS = 150_000
"""Of them, those up to which exchanges are looked at; the rest is for changes at random."""

_SHAKES = 2_000
"""Changes at random, most of which do not fit or are known to be slower."""

_HEAT = 0.02
"""How much slower, as a part of the whole, a change at random may make a choice at first: about what one block more or less does."""

_MOST_SLOTS = 4
"""Deeper prefetch gained less than 1 % where it was measured (sglang PR 31538: 0.9 % for a depth of 16 instead of 1)."""

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

    def __post_init__(self) -> None:
        self.whole = tuple(index for index, size in enumerate(self.sizes_bytes) if size)
        self._row = sum(len(part.steps) for one in self.rounds for part in one.parts)

    def seconds(self, stays: Sequence[bool], slot_count: int) -> float:
        """The phase with this choice, simulated."""
        key = (tuple(stays), slot_count)
        if key not in self._tried:
            slots_of: list[tuple[int, int] | None] = [None] * len(stays)
            moves: list[Move] = []
            for index in self.whole:
                if not stays[index]:
                    slots_of[index] = (0, len(moves))
                    moves.append(self.moves[index])
            switch_s = self.fixed_s + sum(self.bring_s[index] for index in self.whole if stays[index])
            stage = Stage(tuple(slots_of), (tuple(moves),), slot_count, in_ram=self.in_ram)
            self._tried[key] = pace_of(self.rounds, stage, switch_s, self.takes_turns).total_s
            self.steps += 4 * self._row
        return self._tried[key]

    def copies_s(self, stays: Sequence[bool]) -> float:
        """What all copies of the phase take one after the other, and bringing in its residents."""
        moved_s = sum(max(self.moves[i].link_s, self.moves[i].disk_s) for i in self.whole if not stays[i])
        return self.fixed_s + sum(self.bring_s[i] for i in self.whole if stays[i]) + sum(one.count for one in self.rounds) * moved_s

    def floor_s(self, stays: Sequence[bool], slot_count: int) -> float:
        """What the phase with this choice takes at least: all its computing, or all copies but those of what the slots can hold over."""
        compute_s = sum(one.count * one.compute_s for one in self.rounds)
        switch_s = self.fixed_s + sum(self.bring_s[index] for index in self.whole if stays[index])
        copies = sorted((max(self.moves[i].link_s, self.moves[i].disk_s) for i in self.whole if not stays[i]), reverse=True)
        return switch_s + max(compute_s, sum(one.count for one in self.rounds) * sum(copies[slot_count:]))

    def finished(self, stays: Sequence[bool], slot_count: int) -> Residency:
        """The choice with tied blocks beside their owners."""
        resident = tuple(stays[owner] for owner in self.owners)
        streamed = [self.sizes_bytes[index] for index in self.whole if not stays[index]]
        return Residency(resident, slot_count if streamed else 0, max(streamed, default=0))


@dataclass(frozen=True, slots=True, order=True)
class _Way:
    """A choice with what it takes: seconds, then bytes streamed, then slots; less is better."""

    seconds: float
    streamed_bytes: int
    slot_count: int
    stays: tuple[bool, ...]


def choose_timed(problem: Problem) -> Residency | None:
    """Choose the resident blocks of a phase by its simulated time.

    Of equally fast choices the one that streams the fewest bytes is taken, then the one with the fewest slots.

    Returns:
        None where not even one slot for the largest block fits.
    """
    everything = (True,) * len(problem.sizes_bytes)
    if sum(problem.sizes_bytes) <= problem.room_bytes and not problem.takes_turns:
        return problem.finished(everything, 0)
    exact = len(problem.whole) <= MOST_ENUMERATED
    least_s = sum(one.count * one.compute_s for one in problem.rounds) + problem.fixed_s
    found: list[_Way] = []
    for stays, slot_count in _all_ways(problem) if exact else _some_ways(problem):
        if found and not exact:
            # The first way streams the fewest bytes. Its copies are no strict bound, for other slots may leave room for one block more;
            # among many blocks that is little.
            fewest_s = problem.copies_s(found[0].stays) if len(problem.whole) > _MANY else 0.0
            enough_s = max(least_s, fewest_s) * _ENOUGH
            if problem.steps > _MOST_STEPS or min(found).seconds <= enough_s:
                return _finished(problem, found)
        if exact and found and problem.floor_s(stays, slot_count) > min(found).seconds:
            continue
        found.append(_way(problem, stays, slot_count))
        if exact:
            found = [_better(found)]
    if not found:
        return None
    if not exact:
        # A choice with another number of slots is several changes away: the best of each number is improved on its own.
        starts = {way.slot_count: way for way in sorted(found, reverse=True)}
        found += [_exchanged(problem, way) for way in sorted(starts.values())]
        if min(found).seconds > max(least_s, problem.copies_s(found[0].stays)) * _ALMOST:
            found.append(_shaken(problem, min(found)))
    return _finished(problem, found)


def _way(problem: Problem, stays: Sequence[bool], slot_count: int) -> _Way:
    streamed_bytes = sum(size for size, stay in zip(problem.sizes_bytes, stays, strict=True) if not stay)
    return _Way(problem.seconds(stays, slot_count), streamed_bytes, slot_count, tuple(stays))


def _better(found: Sequence[_Way]) -> _Way:
    """The best of all ways, of which two that differ by rounding alone are equally fast."""
    least_s = min(way.seconds for way in found)
    return min((way for way in found if way.seconds * _CLEARLY <= least_s), key=lambda way: (way.streamed_bytes, way.slot_count))


def _finished(problem: Problem, found: Sequence[_Way]) -> Residency:
    best = _better(found)
    return problem.finished(best.stays, best.slot_count)


def _fits(problem: Problem, stays: Sequence[bool], slot_count: int) -> bool:
    kept = sum(size for size, stay in zip(problem.sizes_bytes, stays, strict=True) if stay)
    slot = max((size for size, stay in zip(problem.sizes_bytes, stays, strict=True) if not stay), default=0)
    return kept + slot_count * slot <= problem.room_bytes


def _all_ways(problem: Problem) -> Iterator[tuple[tuple[bool, ...], int]]:
    whole = problem.whole
    for flags in product((True, False), repeat=len(whole)):
        stays = [True] * len(problem.sizes_bytes)
        for index, flag in zip(whole, flags, strict=True):
            stays[index] = flag
        streamed = flags.count(False)
        # As many slots as streamed blocks would be residency by another name.
        for slot_count in range(1, streamed) if streamed else (0,):
            if _fits(problem, stays, slot_count):
                yield tuple(stays), slot_count


def _some_ways(problem: Problem) -> Iterator[tuple[tuple[bool, ...], int]]:
    """Ways to fill the room, the most promising first: the most bytes, spread evenly; then by other orders and with other slots."""
    most = choose(problem.sizes_bytes, problem.owners, problem.room_bytes)
    if most is None:
        return
    if most.slot_count == 0:
        yield (True,) * len(problem.sizes_bytes), 0
    else:
        yield _owned(problem, most.resident), most.slot_count
    for slot_count in (2, 3, _MOST_SLOTS, 1):
        for order in _orders(problem):
            filled = _filled(problem, order, slot_count, problem.room_bytes)
            if filled is not None:
                yield filled, slot_count
    if problem.takes_turns:
        # Residents come in before anything computes and streamed blocks while others do, so that less than fits may be better. These
        # rooms do not depend on the budget: a larger one tries what a smaller one tried.
        scattered = next(_orders(problem))
        for eighth in range(_EIGHTHS - 1, 0, -1):
            filled = _filled(problem, scattered, 2, min(problem.room_bytes, sum(problem.sizes_bytes) * eighth // _EIGHTHS))
            if filled is not None:
                yield filled, 2
    nothing = tuple(not size for size in problem.sizes_bytes)
    for slot_count in (2, 3, _MOST_SLOTS, 1):
        if slot_count < len(problem.whole) and _fits(problem, nothing, slot_count):
            yield nothing, slot_count


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


def _filled(problem: Problem, order: Sequence[int], slot_count: int, room_bytes: int) -> tuple[bool, ...] | None:
    """Keep blocks in an order while a room holds them beside slots for the largest of the rest."""
    sizes = problem.sizes_bytes
    by_size = sorted(problem.whole, key=lambda i: -sizes[i])
    stays = [not size for size in sizes]
    kept_bytes = largest = left = 0
    left = len(by_size)
    for index in order:
        if left <= slot_count + 1:
            break
        stays[index] = True
        after = largest
        while after < len(by_size) and stays[by_size[after]]:
            after += 1
        if kept_bytes + sizes[index] + slot_count * sizes[by_size[after]] <= room_bytes:
            kept_bytes += sizes[index]
            largest = after
            left -= 1
        else:
            stays[index] = False
    return tuple(stays) if left > slot_count and _fits(problem, stays, slot_count) else None


def _exchanged(problem: Problem, way: _Way) -> _Way:
    """Change a choice step by step while that is faster and steps are left."""
    improved = True
    while improved and problem.steps <= _EXCHANGED_STEPS:
        improved = False
        for stays, slot_count in _changes(problem, way):
            if problem.steps > _EXCHANGED_STEPS:
                break
            problem.steps += len(stays)  # looking at a change costs about as much as simulating so many steps
            if not slot_count < stays.count(False) or not _fits(problem, stays, slot_count):
                continue
            if problem.floor_s(stays, slot_count) >= way.seconds:
                continue
            other = _way(problem, stays, slot_count)
            if other.seconds < way.seconds * _CLEARLY:
                way, improved = other, True
                break
    return way


def _changes(problem: Problem, way: _Way) -> Iterator[tuple[list[bool], int]]:
    """One slot more or less, one block more or less, and one block for another, neighbours first; of few blocks three at once."""
    slot_count = max(1, way.slot_count)
    for other in (slot_count + 1, slot_count - 1):
        if 1 <= other <= _MOST_SLOTS:
            yield list(way.stays), other
    singles = [(index,) for index in problem.whole]
    # Where a block is much of the whole, one that goes makes room for two; among many blocks, exchanges of two get there step by step.
    triples = combinations(problem.whole, 3) if len(problem.whole) <= _FEW else ()
    for change in chain(singles, pairwise(problem.whole), combinations(problem.whole, 2), triples):
        if len(change) > 1 and len({way.stays[index] for index in change}) == 1:
            continue
        stays = list(way.stays)
        for index in change:
            stays[index] = not stays[index]
        yield stays, slot_count


def _shaken(problem: Problem, way: _Way) -> _Way:
    """Change a choice at random while steps are left, at first for the worse too: exchanges alone may be stuck. Always the same changes."""
    draw, present, best = Random(0), way, way
    for number in range(_SHAKES):
        if problem.steps > _MOST_STEPS:
            break
        stays = list(present.stays)
        for index in draw.sample(problem.whole, draw.randint(1, 3)):
            stays[index] = not stays[index]
        problem.steps += len(stays)
        heat_s = _HEAT * way.seconds * (1 - max(number / _SHAKES, problem.steps / _MOST_STEPS))
        slot_count = max(1, way.slot_count)
        if not slot_count < stays.count(False) or not _fits(problem, stays, slot_count):
            continue
        if problem.floor_s(stays, slot_count) >= present.seconds + 3 * heat_s:
            continue
        other = _way(problem, stays, slot_count)
        if other.seconds <= present.seconds or (heat_s > 0 and draw.random() < exp((present.seconds - other.seconds) / heat_s)):
            present = other
            best = min(best, present)
    return best
