"""Who touched which bytes, and whether anything put the touches in order; knows vector clocks, not time or torch.

A *tick* numbers the pieces of work of one stream. `seen` maps a stream to the last tick of it that an observer (another
stream, or the host) is known to come after. Work A of stream s at tick n is ordered before an observer if the observer
is s itself or has seen s up to n; or if the host has, since the host enqueues what follows.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from typing import Any, NamedTuple, Protocol

from .config import HazardError, HazardMode

Seen = dict[int, int]


class Access(NamedTuple):
    """Bytes [lo, hi) of a block as one piece of work used them."""

    lo: int
    hi: int
    stream: int
    tick: int
    is_write: bool
    op: str


class Tracked(Protocol):
    """What the checks need of a device allocation."""

    serial: int
    nbytes: int
    stream: int
    shared_with: set[int]
    accesses: list[Access]


Span = tuple[Tracked, int, int]


class SourceWatch(NamedTuple):
    """Host bytes that must not change until the host knows that the copy which reads them has completed."""

    stream: int
    tick: int
    pointer: int
    nbytes: int
    checksum: int
    storage: weakref.ref[Any]


def join(into: Seen, other: Seen) -> None:
    """Makes `into` see everything that `other` has seen."""
    for stream, tick in other.items():
        if into.get(stream, 0) < tick:
            into[stream] = tick


def checksum(pointer: int, nbytes: int) -> int:
    return zlib.crc32((ctypes.c_char * nbytes).from_address(pointer))


class Hazards:
    """Collects hazards, and raises them if asked to."""

    def __init__(self, mode: HazardMode) -> None:
        self.mode = mode
        self.found: list[str] = []
        self._unraised: str | None = None
        self._sources: list[SourceWatch] = []

    @property
    def active(self) -> bool:
        return self.mode != "off"

    def access(self, span: Span, stream: int, seen: Seen, host_seen: Seen, is_write: bool, op: str) -> None:
        """Notes that work `op` of `stream`, at the tick `seen[stream]`, uses `span`.

        Raises:
            HazardError: another stream's use is not ordered before this one, one of the two writes, mode is "raise".
        """
        block, lo, hi = span
        kept = []
        for past in block.accesses:
            if past.lo < hi and lo < past.hi:
                ordered = past.stream == stream or self._is_seen(past, seen, host_seen)
                if (past.is_write or is_write) and not ordered:
                    self._raise(
                        f"{_kind(past.is_write, is_write)} hazard: {op} on stream {stream} touches bytes "
                        f"[{lo}, {hi}) of block {block.serial} ({block.nbytes} bytes) after {past.op} on stream "
                        f"{past.stream}, and no event or synchronize orders the two"
                    )
                covered = lo <= past.lo and past.hi <= hi
                # a later use that is ordered after this one implies the earlier use: keep the lists short
                if ordered and covered and (is_write or (not past.is_write and past.stream == stream)):
                    continue
            kept.append(past)
        kept.append(Access(lo, hi, stream, seen[stream], is_write, op))
        block.accesses = kept

    def freed(self, block: Tracked, owner_seen: Seen, host_seen: Seen) -> None:
        """A block died: its stream may reuse the bytes at once, so all other streams must be done with them."""
        if not self.active:
            return
        for past in block.accesses:
            known = past.stream in block.shared_with or self._is_seen(past, owner_seen, host_seen)
            if past.stream != block.stream and not known:
                # a weak reference callback cannot raise: the next call into the device will
                self._later(
                    f"block {block.serial} ({block.nbytes} bytes, allocated on stream {block.stream}) was freed while "
                    f"{past.op} on stream {past.stream} may still use it (no wait, synchronize or record_stream)"
                )
                return

    def watch_source(self, stream: int, tick: int, pointer: int, nbytes: int, storage: Any) -> None:
        """From now until the host knows that (stream, tick) completed, the host bytes must stay as they are."""
        if self.active and nbytes:
            crc = checksum(pointer, nbytes)
            self._sources.append(SourceWatch(stream, tick, pointer, nbytes, crc, weakref.ref(storage)))

    def forget_sources(self, pointer: int, nbytes: int) -> None:
        """The device itself is about to write these host bytes: they may change."""
        self._sources = [w for w in self._sources if w.pointer + w.nbytes <= pointer or pointer + nbytes <= w.pointer]

    def check_sources(self, host_seen: Seen) -> None:
        """The host has learned of completions: were the sources left alone until now?"""
        waiting = []
        for watch in self._sources:
            if host_seen.get(watch.stream, 0) < watch.tick:
                waiting.append(watch)
            elif watch.storage() is not None and checksum(watch.pointer, watch.nbytes) != watch.checksum:
                self._later(
                    f"WAR hazard: the host overwrote {watch.nbytes} pinned bytes at {watch.pointer:#x} before it knew "
                    f"that the copy which reads them (stream {watch.stream}) had completed"
                )
        self._sources = waiting

    def raise_late(self) -> None:
        """Raises what was found where nothing could be raised."""
        message, self._unraised = self._unraised, None
        if message is not None:
            raise HazardError(message)

    @staticmethod
    def _is_seen(past: Access, seen: Seen, host_seen: Seen) -> bool:
        return seen.get(past.stream, 0) >= past.tick or host_seen.get(past.stream, 0) >= past.tick

    def _raise(self, message: str) -> None:
        self.found.append(message)
        if self.mode == "raise":
            raise HazardError(message)

    def _later(self, message: str) -> None:
        self.found.append(message)
        if self.mode == "raise" and self._unraised is None:
            self._unraised = message


def _kind(past_write: bool, now_write: bool) -> str:
    return ("W" if now_write else "R") + "A" + ("W" if past_write else "R")
