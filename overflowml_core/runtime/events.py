"""What happened to a plan while it ran: a record for people and tests. Standard library only."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_log = logging.getLogger("overflowml")

MOST_EVENTS = 1000
"""Kept; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change of what is where while a model runs.

    Attributes:
        at_s: seconds since 1970.
        kind: "demoted" (resident blocks are streamed from now on), "promoted" (they are resident again), "retried" (a call was made again
            after it ran out of memory), "not retried" (it could not be), "lightened" (a component takes less memory in its calls from now
            on; the reason says whether results stay the same), "unlightened" (it runs as before).
        reason: in a sentence.
        nbytes: of device memory that were given free or taken; 0 for calls.
    """

    at_s: float
    kind: str
    reason: str
    nbytes: int


class Events:
    """The latest events of one engine, the latest last. Read it as a list; only the engine adds to it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, reason: str, nbytes: int = 0) -> None:
        """Record what happened now. The first of its kind is a warning, the others are told to who listens closely."""
        self._events.append(Event(time.time(), kind, reason, nbytes))
        del self._events[:-MOST_EVENTS]
        level = logging.DEBUG if self._counts[kind] else logging.WARNING
        self._counts[kind] += 1
        _log.log(level, "%s: %s", kind, reason)

    def counted(self) -> str:
        """How often each kind was recorded, as in "2 demoted, 1 promoted"; empty where nothing was."""
        return ", ".join(f"{count} {kind}" for kind, count in self._counts.items())

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: int) -> Event:
        return self._events[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))
