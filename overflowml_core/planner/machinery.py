"""The engines of a machine as a discrete-event simulation: one that computes, one that copies for each accelerator, one that reads the
disk.

It carries out the streamer's rules as docs/streaming.md has them: a block comes into the slot behind that of the block before it, round and
round in the staging buffer; its computing waits for the copy into the slot, the copy waits for the computing of whatever lay there; when
a block is left, its successors are sent for as far as their bytes are free; the last block of a pass sends for the first of the next. It
knows no networks, only seconds and bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from overflowml_core.staging import Place, behind, free_bytes, is_worth

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
        nbytes: what it takes of the staging buffer; where nobody says, the buffer is counted in blocks.
    """

    link_s: float
    disk_s: float = 0.0
    windows: int = 1
    holds_reader: bool = False
    nbytes: int = 1

    @property
    def has_reader(self) -> bool:
        """Whether the reader brings it, as a whole."""
        return bool(self.disk_s) or self.holds_reader


_FAR = float("inf")


@dataclass(slots=True, eq=False)
class Slot:
    """A block's place in the staging buffer, from when it is sent for until it is overwritten.

    Attributes:
        k: the block.
        place: its bytes in the buffer.
        sent_bytes: of it, those that were sent for.
        over: the slots that it put an end to.
        after_s: when what lay there is computed.
        ready_s: when what was sent for is there.
        issued_s: when the host knows that its copy is queued; infinite while the reader has it.
        free_s: when what computed from it last is over.
    """

    k: int
    place: Place
    sent_bytes: int = 0
    over: list[Slot] = field(default_factory=list)
    after_s: float = 0.0
    ready_s: float = 0.0
    issued_s: float = 0.0
    free_s: float = 0.0


@dataclass(slots=True)
class Lane:
    """The staging buffer of one device and the copies into it.

    Attributes:
        moves: of each streamed block, in order.
        staging_bytes: of the buffer, at least those of the largest block.
        copy_free_s: when the copy engine is through with what it was given.
        held: per block, the slot that holds or awaits it.
        live: these slots, in the order in which they were sent for.
        end: the byte behind the block that was called last.
        successor: per block, which one was called after it the last time.
        previous: the block that was called last.
    """

    moves: Sequence[Move]
    staging_bytes: int
    copy_free_s: float = 0.0
    held: list[Slot | None] = field(default_factory=list)
    live: list[Slot] = field(default_factory=list)
    end: int = 0
    successor: list[int] = field(default_factory=list)
    previous: int = -1

    def __post_init__(self) -> None:
        count = len(self.moves)
        self.held = [None] * count
        self.successor = [(k + 1) % count for k in range(count)]
        sizes = {move.nbytes for move in self.moves}
        if len(sizes) == 1:
            (nbytes,) = sizes
            self.staging_bytes -= self.staging_bytes % nbytes

    def turned(self, slot: Slot) -> tuple[int, int, int]:
        """A slot as it is beside the block called last: where blocks have one size, whichever slot that is makes no difference."""
        first = slot.place.start
        if len({move.nbytes for move in self.moves}) == 1:
            first = (first - self.end) % self.staging_bytes
        return first, slot.k, slot.sent_bytes


@dataclass(slots=True)
class _Read:
    """A block that the reader was asked for: for which lane and slot, since when, and how many of its windows are through."""

    lane: int
    slot: Slot
    asked_s: float
    windows_done: int = 0


_EQUAL = 1e-9
"""Times that differ by less, relative to the time between them, are the same: floating-point noise."""


class State(NamedTuple):
    """All that decides how the engines go on.

    Attributes:
        places: what is where in the staging buffers, and what is asked for.
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
            self._prefetch(number, 0)
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
            for slot in lane.live:
                slot.ready_s = slot.issued_s = start_s

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
        places: list[object] = [(read.lane, read.slot.k, read.windows_done) for read in self._reads]
        times = [self.compute_s, self.host_s, self._reader_free_s, *(read.asked_s for read in self._reads)]
        times += self._ring_free_s[self._turn :] + self._ring_free_s[: self._turn]
        for lane in self.lanes:
            slots = sorted(lane.live, key=lane.turned)
            places += [tuple(lane.turned(slot) for slot in slots), tuple(lane.successor)]
            times.append(lane.copy_free_s)
            for slot in slots:
                times += [slot.free_s, slot.after_s, max(slot.ready_s, self.compute_s), max(slot.issued_s, self.host_s)]
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
            for over in {id(over): over for slot in lane.live for over in slot.over}.values():
                over.free_s += seconds
            for slot in lane.live:
                slot.after_s += seconds
                slot.ready_s += seconds
                slot.issued_s += seconds
                slot.free_s += seconds

    # ---- the streamer's rules

    def _wait(self, number: int, k: int) -> float:
        lane = self.lanes[number]
        slot = lane.held[k]
        nbytes = lane.moves[k].nbytes
        if slot is None or slot.sent_bytes < nbytes:
            slot = slot or Slot(k, behind(lane.end, nbytes, lane.staging_bytes))
            for other in self._under(lane, slot, nbytes):
                self._await_issue(other)
            self._send(number, slot, nbytes)
        lane.end = slot.place.end
        if lane.previous >= 0 and lane.previous != k:
            lane.successor[lane.previous] = k
        lane.previous = k
        self._await_issue(slot)
        return max(self.host_s, slot.ready_s)

    def _release(self, number: int, k: int) -> None:
        slot = self.lanes[number].held[k]
        assert slot is not None  # it was waited for
        slot.free_s = self.compute_s
        self._flush(self.host_s)
        self._prefetch(number, self.lanes[number].successor[k])

    def _prefetch(self, number: int, k: int) -> None:
        """Send for a block and its successors as far as their bytes are free of those before them."""
        lane = self.lanes[number]
        end = lane.end
        claimed: list[Place] = []
        for _ in lane.moves:
            move = lane.moves[k]
            slot = lane.held[k] or Slot(k, behind(end, move.nbytes, lane.staging_bytes))
            free = free_bytes(slot.place, claimed)
            waits = slot.sent_bytes < move.nbytes
            if free < move.nbytes and (not waits or move.has_reader):
                return
            if waits and is_worth(move.nbytes, slot.sent_bytes, free) and self._is_issued(lane, slot, free):
                self._send(number, slot, free)
            if free < move.nbytes:
                return
            claimed.append(slot.place)
            end, k = slot.place.end, lane.successor[k]

    def _is_issued(self, lane: Lane, slot: Slot, upto: int) -> bool:
        """Whether no read is under way to where the next bytes of a slot shall go."""
        return all(other.issued_s <= self.host_s for other in self._under(lane, slot, upto))

    def _under(self, lane: Lane, slot: Slot, upto: int) -> list[Slot]:
        """The slots that the next bytes of one put an end to."""
        return [other for other in lane.live if other is not slot and slot.place.overwrites(other.place, slot.sent_bytes, upto)]

    def _send(self, number: int, slot: Slot, upto: int) -> None:
        lane = self.lanes[number]
        move = lane.moves[slot.k]
        # What a read under way put an end to is not waited for by any copy so far; of all else the copies before this one waited.
        reads = [read.slot for read in self._reads if read.lane == number]
        ended = [over for read in reads for over in read.over if slot.place.overwrites(over.place, slot.sent_bytes, upto)]
        for other in self._under(lane, slot, upto):
            ended.append(other)
            lane.held[other.k] = None
            lane.live.remove(other)
            other.over = []
        slot.over += ended
        slot.after_s = max([slot.after_s, *(over.free_s for over in ended)])
        if lane.held[slot.k] is None:
            lane.held[slot.k] = slot
            lane.live.append(slot)
        part = (upto - slot.sent_bytes) / move.nbytes if move.nbytes else 1.0
        slot.sent_bytes = upto
        if move.has_reader:
            slot.issued_s = _FAR
            self._reads.append(_Read(number, slot, self.host_s))
            return
        self._flush(self.host_s)
        slot.ready_s = self._copy(number, slot.k, max(self.host_s, slot.after_s), move.link_s * part)
        slot.issued_s = self.host_s

    def _await_issue(self, slot: Slot) -> None:
        while slot.issued_s == _FAR:
            self._read_window(_FAR)
        self.host_s = max(self.host_s, slot.issued_s)

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
        lane, slot = self.lanes[read.lane], read.slot
        move = lane.moves[slot.k]
        if move.holds_reader:
            return self._copy_pageable(read, lane, until_s)
        seconds = move.disk_s / move.windows
        target_free_s = slot.after_s if self._in_ram else self._ring_free_s[self._turn]
        start_s = max(self._reader_free_s, read.asked_s, target_free_s)
        end_s = start_s + seconds
        if end_s > until_s:
            return False
        self._reader_free_s = end_s
        self.disk_s += seconds
        if self._record is not None:
            self._record("disk", read.lane, slot.k, start_s, end_s)
        ready_s = end_s
        if not self._in_ram:
            ready_s = self._copy(read.lane, slot.k, max(end_s, slot.after_s), move.link_s / move.windows)
            self._ring_free_s[self._turn] = ready_s
            self._turn = (self._turn + 1) % _RING_BUFFERS
        read.windows_done += 1
        if read.windows_done == move.windows:
            slot.ready_s, slot.issued_s = ready_s, end_s
            self._reads.popleft()
        return True

    def _copy_pageable(self, read: _Read, lane: Lane, until_s: float) -> bool:
        slot = read.slot
        start_s = max(self._reader_free_s, read.asked_s)
        if start_s > until_s:
            return False
        self._reader_free_s = self._copy(read.lane, slot.k, max(start_s, slot.after_s), lane.moves[slot.k].link_s)
        slot.ready_s = slot.issued_s = self._reader_free_s
        self._reads.popleft()
        return True
