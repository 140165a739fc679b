"""Streams, events and engines on a simulated clock, and the copies that have not happened yet; knows nothing of torch.

Work is placed on the time line when it is enqueued. Operators also compute at once; asynchronous copies are queued on
their stream and *land* when something waits for them: later work of the same stream other than a copy to the device, a
stream that waits for an event, or the host. Before that nothing entitles anybody to the bytes: a missing wait shows.

The order of events (who has seen what) is one clock for all host threads, because a hand-over between threads cannot be
seen from here; the host's time is one clock per thread, so that a reader thread that waits does not delay the launches
of the thread that computes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from .config import Config
from .hazards import Hazards, Seen, Span, join

Engine = Literal["compute", "h2d", "d2h"]


class LogEntry(NamedTuple):
    """One piece of work on the time line."""

    engine: Engine
    stream: int
    op: str
    start_s: float
    end_s: float


class Deferred(Protocol):
    """A queued copy: calling it moves the bytes."""

    reads_device: bool

    def __call__(self) -> None: ...


class StreamState:
    """Work of one stream so far: when it ends, how much it is, what it comes after, what is still to land."""

    __slots__ = ("id", "queue", "seen", "tick", "time_s")

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.time_s = 0.0
        self.tick = 0
        self.seen: Seen = {}
        self.queue: deque[tuple[int, Deferred]] = deque()


class EventState:
    """A point in a stream: when it is reached and what it comes after."""

    __slots__ = ("recorded", "seen", "time_s")

    def __init__(self) -> None:
        self.time_s = 0.0
        self.seen: Seen = {}
        self.recorded = False


class _Thread(threading.local):
    """The part of the state that every host thread has for itself."""

    stream = 0
    time_s: float | None = None


class Clock:
    """The time line of one device. Every method may be called from any thread."""

    def __init__(self, config: Config, hazards: Hazards, lock: threading.RLock) -> None:
        self._lock = lock
        self.streams: dict[int, StreamState] = {0: StreamState(0)}
        self.reset(config, hazards)

    def reset(self, config: Config, hazards: Hazards) -> None:
        """Time zero again. Streams stay valid, what has not landed lands, all threads are back on stream 0."""
        with self._lock:
            for stream in self.streams.values():
                self.land(stream)
            self._config, self._hazards = config, hazards
            self.streams = {stream_id: StreamState(stream_id) for stream_id in self.streams}
            self._engine_free_s: dict[Engine, float] = {"compute": 0.0, "h2d": 0.0, "d2h": 0.0}
            self._thread = _Thread()
            self._latest_host_s = 0.0
            self.host_seen: Seen = {}
            self.log: list[LogEntry] = []

    # ---- the host's own clock

    @property
    def host_s(self) -> float:
        """The calling thread's time."""
        if self._thread.time_s is None:  # a new thread was started by one that is no later than this
            self._thread.time_s = self._latest_host_s
        return self._thread.time_s

    def host_until(self, time_s: float) -> None:
        """The calling thread is busy or blocked until `time_s`."""
        with self._lock:
            self._thread.time_s = max(self.host_s, time_s)
            self._latest_host_s = max(self._latest_host_s, self._thread.time_s)

    def elapsed_s(self) -> float:
        """When all that has been enqueued is done."""
        return max(self._latest_host_s, *(stream.time_s for stream in self.streams.values()))

    # ---- streams

    def new_stream(self) -> int:
        with self._lock:
            stream_id = max(self.streams) + 1
            self.streams[stream_id] = StreamState(stream_id)
            return stream_id

    def current(self) -> StreamState:
        """The calling thread's stream."""
        return self.streams[self._thread.stream]

    def set_current(self, stream_id: int) -> int:
        """Switches the calling thread to a stream and returns the one it was on."""
        previous = self._thread.stream
        self._thread.stream = stream_id
        return previous

    # ---- work

    def begin(self, op: str, reads: Iterable[Span], writes: Iterable[Span]) -> StreamState:
        """Enqueues a piece of work on the current stream: gives it its tick and checks the order of what it touches."""
        self._hazards.raise_late()
        stream = self.current()
        stream.tick += 1
        stream.seen[stream.id] = stream.tick
        if self._hazards.active:
            for spans, is_write in ((reads, False), (writes, True)):
                for span in spans:
                    self._hazards.access(span, stream.id, stream.seen, self.host_seen, is_write, op)
        return stream

    def place(self, engine: Engine, op: str, duration_s: float, stream: StreamState) -> None:
        """Puts the work that `begin` enqueued on the time line."""
        self.host_until(self.host_s + self._config.launch_s)
        start_s = max(self.host_s, stream.time_s, self._engine_free_s[engine])
        stream.time_s = self._engine_free_s[engine] = start_s + duration_s
        self.log.append(LogEntry(engine, stream.id, op, start_s, stream.time_s))

    def defer(self, stream: StreamState, land: Deferred) -> None:
        """`land` is called when something waits for the work that `begin` enqueued last on `stream`."""
        stream.queue.append((stream.tick, land))

    def land(self, stream: StreamState, up_to_tick: int | None = None) -> None:
        """Performs what is queued on the stream, all of it or up to a tick."""
        while stream.queue and (up_to_tick is None or stream.queue[0][0] <= up_to_tick):
            stream.queue.popleft()[1]()

    # ---- waiting

    def record(self, event: EventState, stream: StreamState) -> None:
        with self._lock:
            event.time_s = max(stream.time_s, self.host_s)
            event.seen, event.recorded = dict(stream.seen), True

    def wait(self, event: EventState, stream: StreamState) -> None:
        """Later work of `stream` comes after `event`; the host goes on."""
        with self._lock:
            if event.recorded:
                self._land_all(event.seen)
                stream.time_s = max(stream.time_s, event.time_s)
                join(stream.seen, event.seen)

    def synchronize(self, *points: StreamState | EventState) -> None:
        """The host waits for streams or events, then knows that their work is done."""
        with self._lock:
            for point in points:
                self._land_all(point.seen)
                self.host_until(point.time_s)
                join(self.host_seen, point.seen)
            self._hazards.check_sources(self.host_seen)
            self._hazards.raise_late()

    def query(self, point: StreamState | EventState) -> bool:
        """Whether the host's clock has reached the point; if so the host knows that the work is done."""
        with self._lock:
            if point.time_s <= self.host_s:
                self.synchronize(point)
                return True
            self.host_until(self.host_s + self._config.poll_s)
            return False

    def _land_all(self, seen: Seen) -> None:
        for stream_id, tick in seen.items():
            self.land(self.streams[stream_id], tick)
