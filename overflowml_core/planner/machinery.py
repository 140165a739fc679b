"""The engines of a machine as a discrete-event simulation: one that computes, one that copies for each accelerator, one that reads the
disk.

It carries out the streamer's rules as docs/streaming.md has them: a block comes into the slot behind that of the block before it, round and
round; its computing waits for the copy into the slot, the next copy into the slot waits for its computing; when a block is left, the next N
blocks are sent for that are not in a slot already; the last block of a pass sends for the first of the next. It knows no networks, only
seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Record = Callable[[str, int, int, float, float], None]
"""Told of every piece of work: engine ("compute", "link", "disk"), device, step or streamed index, start and end in seconds."""

Step = tuple[int, int, float, int]
"""What computes next: device, streamed index or -1, seconds, and the block's index for whoever wants to name it."""

_RING_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Move:
    """How a streamed block comes to its slot.

    Attributes:
        link_s: seconds of the copy engine; 0 where the device computes in RAM.
        disk_s: seconds of the reader; 0 where the block waits in RAM.
        windows: reads and copies into which it is cut, where it comes from disk.
        holds_reader: the copy is from pageable memory: the reader asks for it, and does nothing else until it is over.
    """

    link_s: float
    disk_s: float = 0.0
    windows: int = 1
    holds_reader: bool = False


@dataclass(slots=True)
class Lane:
    """The staging slots of one device and the copies into them.

    Attributes:
        moves: of each streamed block, in order.
        slot_count: staging slots; more than there are blocks are not used.
        copy_free_s: when the copy engine is through with what it was given.
        free_s: per slot, when what computed from it last is over.
        ready_s: per block, when it is in its slot.
        issued_s: per block, when the host knows that its copy is queued; infinite while the reader has it.
        holder: per slot, the block that it holds or awaits; -1 for none.
        slot_of: per block, the slot that holds or awaits it; -1 for none.
        last: slot of the block that was called last.
        successor: per block, which one was called after it the last time.
        previous: the block that was called last.
    """

    moves: Sequence[Move]
    slot_count: int
    copy_free_s: float = 0.0
    free_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    issued_s: list[float] = field(default_factory=list)
    holder: list[int] = field(default_factory=list)
    slot_of: list[int] = field(default_factory=list)
    last: int = 0
    successor: list[int] = field(default_factory=list)
    previous: int = -1

    def __post_init__(self) -> None:
        count = len(self.moves)
        self.slot_count = min(self.slot_count, count)
        self.free_s = [0.0] * self.slot_count
        self.holder = [-1] * self.slot_count
        self.slot_of = [-1] * count
        self.last = self.slot_count - 1
        self.ready_s = [0.0] * count
        self.issued_s = [0.0] * count
        self.successor = [(k + 1) % count for k in range(count)]


@dataclass(slots=True)
class _Read:
    """A block that the reader was asked for: which lane and block, since when, and how many of its windows are through."""

    lane: int
    k: int
    asked_s: float
    windows_done: int = 0


_FAR = float("inf")

_EQUAL = 1e-9
"""Times that differ by less, relative to the time between them, are the same: floating-point noise."""


class State(NamedTuple):
    """All that decides how the engines go on.

    Attributes:
        places: what is in which slot and what is asked for, the slots counted from the one whose turn it is.
        times_s: when engines, slots, buffers and blocks are free or ready; the computing engine first.
    """

    places: tuple[object, ...]
    times_s: tuple[float, ...]

    def follows(self, earlier: State) -> bool:
        """Whether all is as it was then, every time as much later; what stood still had no part in it."""
        if self.places != earlier.places:
            return False
        passed_s = self.times_s[0] - earlier.times_s[0]
        slack_s = _EQUAL * passed_s
        for now_s, then_s in zip(self.times_s, earlier.times_s, strict=True):
            if now_s != then_s and not -slack_s <= now_s - then_s - passed_s <= slack_s:
                return False
        return True


class Machinery:
    """Runs rows of steps, pass after pass, and says when each one ends."""

    def __init__(
        self, lanes: Sequence[Lane], start_s: float = 0.0, *, filled: bool = False, in_ram: bool = False, record: Record | None = None
    ) -> None:
        """Fill the slots.

        Args:
            lanes: one for each device.
            start_s: when the devices and copy engines are free.
            filled: the slots are full at the start, for the pass before has sent for the first blocks.
            in_ram: the device computes in RAM: blocks are read straight into their slots, and the host does not run ahead of what computes.
            record: told of every piece of work.
        """
        self.lanes = lanes
        self.compute_s = start_s
        self.host_s = start_s
        self.link_s = 0.0
        self.disk_s = 0.0
        self._in_ram = in_ram
        self._record = None if filled else record
        self._reader_free_s = start_s
        self._ring_free_s = [0.0] * _RING_BUFFERS
        self._turn = 0
        self._reads: deque[_Read] = deque()
        for number, lane in enumerate(lanes):
            lane.copy_free_s = max(lane.copy_free_s, start_s)
            lane.free_s = [start_s] * lane.slot_count
            for k in range(lane.slot_count):
                self._send(number, k, k)
        if filled:
            self._fill(start_s)
        self._record = record

    def _fill(self, start_s: float) -> None:
        self._flush(_FAR)
        self.host_s = self._reader_free_s = start_s
        self._ring_free_s = [start_s] * _RING_BUFFERS
        self.link_s = self.disk_s = 0.0
        for lane in self.lanes:
            lane.copy_free_s = start_s
            for times in (lane.ready_s, lane.issued_s):
                times[:] = [start_s] * len(times)

    def run(self, steps: Sequence[Step]) -> float:
        """One pass, step after step. When it ends, in seconds."""
        for step, (number, k, seconds, _) in enumerate(steps):
            start_s = max(self.compute_s, self.host_s)
            if k >= 0:
                start_s = max(start_s, self._wait(number, k))
            self.compute_s = start_s + seconds
            if self._in_ram:
                self.host_s = self.compute_s
            if self._record is not None and seconds:
                self._record("compute", number, step, start_s, self.compute_s)
            if k >= 0:
                self._release(number, k)
        return self.compute_s

    def drain(self) -> float:
        """When everything is over that was started, as the end of a phase waits for it."""
        self._flush(_FAR)
        return max([self.compute_s, self._reader_free_s if self._in_ram else 0.0, *(lane.copy_free_s for lane in self.lanes)])

    def state(self) -> State:
        """How the engines are at the end of a pass."""
        places: list[object] = [(read.lane, read.k, read.windows_done) for read in self._reads]
        times = [self.compute_s, self.host_s, self._reader_free_s, *(read.asked_s for read in self._reads)]
        times += self._ring_free_s[self._turn :] + self._ring_free_s[: self._turn]
        for lane in self.lanes:
            turn = lane.last + 1
            held = lane.holder[turn:] + lane.holder[:turn]
            places += [tuple(held), tuple(lane.successor)]
            times += [lane.copy_free_s, *lane.free_s[turn:], *lane.free_s[:turn]]
            for k in held:
                times += [max(lane.ready_s[k], self.compute_s), max(lane.issued_s[k], self.host_s)]
        return State(tuple(places), tuple(times))

    def skip(self, seconds: float) -> None:
        """Let so much time pass in which everything goes on as it does now."""
        for read in self._reads:
            read.asked_s += seconds
        self.compute_s += seconds
        self.host_s += seconds
        self._reader_free_s += seconds
        self._ring_free_s = [t + seconds for t in self._ring_free_s]
        for lane in self.lanes:
            lane.copy_free_s += seconds
            for times in (lane.free_s, lane.ready_s, lane.issued_s):
                times[:] = [t + seconds for t in times]

    # ---- the streamer's rules

    def _wait(self, number: int, k: int) -> float:
        lane = self.lanes[number]
        if lane.slot_of[k] < 0:
            slot = (lane.last + 1) % lane.slot_count
            if lane.holder[slot] >= 0:
                self._await_issue(lane, lane.holder[slot])
            self._send(number, k, slot)
        lane.last = lane.slot_of[k]
        if lane.previous >= 0 and lane.previous != k:
            lane.successor[lane.previous] = k
        lane.previous = k
        self._await_issue(lane, k)
        return max(self.host_s, lane.ready_s[k])

    def _release(self, number: int, k: int) -> None:
        lane = self.lanes[number]
        slot = lane.slot_of[k]
        lane.free_s[slot] = self.compute_s
        self._flush(self.host_s)
        claimed = set()
        for step in range(1, lane.slot_count + 1):
            k = lane.successor[k]
            held = lane.slot_of[k]
            place = (slot + step) % lane.slot_count if held < 0 else held
            if place in claimed:
                continue
            claimed.add(place)
            if held < 0 and lane.issued_s[lane.holder[place]] <= self.host_s:
                self._send(number, k, place)

    def _send(self, number: int, k: int, slot: int) -> None:
        lane = self.lanes[number]
        if lane.holder[slot] >= 0:
            lane.slot_of[lane.holder[slot]] = -1
        lane.holder[slot], lane.slot_of[k] = k, slot
        move = lane.moves[k]
        if move.disk_s or move.holds_reader:
            lane.issued_s[k] = _FAR
            self._reads.append(_Read(number, k, self.host_s))
            return
        self._flush(self.host_s)
        lane.ready_s[k] = self._copy(number, k, max(self.host_s, lane.free_s[slot]), move.link_s)
        lane.issued_s[k] = self.host_s

    def _await_issue(self, lane: Lane, k: int) -> None:
        while lane.issued_s[k] == _FAR:
            self._read_window(_FAR)
        self.host_s = max(self.host_s, lane.issued_s[k])

    # ---- the engines

    def _copy(self, number: int, k: int, earliest_s: float, seconds: float) -> float:
        lane = self.lanes[number]
        start_s = max(earliest_s, lane.copy_free_s)
        lane.copy_free_s = start_s + seconds
        self.link_s += seconds
        if self._record is not None and seconds:
            self._record("link", number, k, start_s, lane.copy_free_s)
        return lane.copy_free_s

    def _flush(self, until_s: float) -> None:
        """Place what the reader has done until then; copies of the host that come later queue up behind it."""
        while self._reads and self._read_window(until_s):
            pass

    def _read_window(self, until_s: float) -> bool:
        read = self._reads[0]
        lane = self.lanes[read.lane]
        move, slot = lane.moves[read.k], lane.slot_of[read.k]
        if move.holds_reader:
            return self._copy_pageable(read, lane, until_s)
        seconds = move.disk_s / move.windows
        target_free_s = lane.free_s[slot] if self._in_ram else self._ring_free_s[self._turn]
        start_s = max(self._reader_free_s, read.asked_s, target_free_s)
        end_s = start_s + seconds
        if end_s > until_s:
            return False
        self._reader_free_s = end_s
        self.disk_s += seconds
        if self._record is not None:
            self._record("disk", read.lane, read.k, start_s, end_s)
        ready_s = end_s
        if not self._in_ram:
            ready_s = self._copy(read.lane, read.k, max(end_s, lane.free_s[slot]), move.link_s / move.windows)
            self._ring_free_s[self._turn] = ready_s
            self._turn = (self._turn + 1) % _RING_BUFFERS
        read.windows_done += 1
        if read.windows_done == move.windows:
            lane.ready_s[read.k], lane.issued_s[read.k] = ready_s, end_s
            self._reads.popleft()
        return True

    def _copy_pageable(self, read: _Read, lane: Lane, until_s: float) -> bool:
        start_s = max(self._reader_free_s, read.asked_s)
        if start_s > until_s:
            return False
        slot_free_s = lane.free_s[lane.slot_of[read.k]]
        self._reader_free_s = self._copy(read.lane, read.k, max(start_s, slot_free_s), lane.moves[read.k].link_s)
        lane.ready_s[read.k] = lane.issued_s[read.k] = self._reader_free_s
        self._reads.popleft()
        return True
