"""The engines of a machine as a discrete-event simulation: one that computes, one that copies for each accelerator, one that reads the
disk.

It carries out the streamer's rules as docs/streaming.md has them: streamed block k uses slot k modulo N; its computing waits for the copy
into the slot, the next copy into the slot waits for its computing; when a block is left, the next N blocks are sent for where their slots
are not held already; the last block of a pass sends for the first of the next. It knows no networks, only seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        blocks_host: the copy is from pageable memory, and the host does nothing until it is over.
    """

    link_s: float
    disk_s: float = 0.0
    windows: int = 1
    blocks_host: bool = False


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
        holder: per slot, the block that it holds or awaits.
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
    successor: list[int] = field(default_factory=list)
    previous: int = -1

    def __post_init__(self) -> None:
        count = len(self.moves)
        self.slot_count = min(self.slot_count, count)
        self.free_s = [0.0] * self.slot_count
        self.holder = [-1] * self.slot_count
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
                self._send(number, k)
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

    def skip(self, seconds: float) -> None:
        """Let so much time pass in which everything goes on as it does now."""
        self._flush(_FAR)
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
        slot = k % lane.slot_count
        if lane.holder[slot] != k:
            if lane.holder[slot] >= 0:
                self._await_issue(lane, lane.holder[slot])
            self._send(number, k)
        if lane.previous >= 0 and lane.previous != k:
            lane.successor[lane.previous] = k
        lane.previous = k
        self._await_issue(lane, k)
        return max(self.host_s, lane.ready_s[k])

    def _release(self, number: int, k: int) -> None:
        lane = self.lanes[number]
        lane.free_s[k % lane.slot_count] = self.compute_s
        self._flush(self.host_s)
        claimed = set()
        for _ in range(lane.slot_count):
            k = lane.successor[k]
            slot = k % lane.slot_count
            if slot in claimed:
                continue
            claimed.add(slot)
            held = lane.holder[slot]
            if held != k and lane.issued_s[held] <= self.host_s:
                self._send(number, k)

    def _send(self, number: int, k: int) -> None:
        lane = self.lanes[number]
        slot = k % lane.slot_count
        lane.holder[slot] = k
        move = lane.moves[k]
        if move.disk_s:
            lane.issued_s[k] = _FAR
            self._reads.append(_Read(number, k, self.host_s))
            return
        self._flush(self.host_s)
        lane.ready_s[k] = self._copy(number, k, max(self.host_s, lane.free_s[slot]), move.link_s)
        if move.blocks_host:
            self.host_s = lane.ready_s[k]
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
        move, slot = lane.moves[read.k], read.k % lane.slot_count
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
