"""Times a model's operations on the CPU in company: one after the other in the model's own order, with weights that no cache holds any
more and results that live for a while. Alone and over and over, an operation finds caches and pages as it never does in a model."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from overflowml_core.runtime.probe_works import Recipe

_HELD_RESULTS = 6
"""Results that are alive at once: a block holds its input, a residual and what its branches made."""

_WEIGHTS_IN_ALL_BYTES = 256 * 2**20
"""Weights that a round of all copies reads; more than the caches of any processor hold."""

_MOST_COPIES = 8
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 15
_ENOUGH_S = 12.0
"""Seconds of rounds after which the least number of them is enough."""


@dataclass(slots=True)
class _Player:
    """One operation, with copies of its inputs that take turns, and the seconds of its calls."""

    signature: str
    calls: list[Callable[[], object]]
    seconds: list[float] = field(default_factory=list)

    def play(self, turn: int) -> object:
        """Call it once and note how long it took."""
        call = self.calls[turn % len(self.calls)]
        began = time.perf_counter()
        result = call()
        self.seconds.append(time.perf_counter() - began)
        return result


@dataclass(frozen=True, slots=True)
class Part:
    """An operation to time.

    Attributes:
        signature, recipe: from a trace.
        nbytes: of its inputs.
        reads_weights: whether most of them are weights.
        make: builds its inputs and returns a call.
    """

    signature: str
    recipe: Recipe
    nbytes: int
    reads_weights: bool
    make: Callable[[Recipe], Callable[[], object]]


def time_in_company(parts: list[Part], room_bytes: int, until: float) -> tuple[dict[str, float], dict[str, Exception]]:
    """Median seconds of one call of each operation.

    Args:
        parts: in the order in which the model runs them.
        room_bytes: memory for inputs; more operations than fit are timed in groups.
        until: time of ``time.perf_counter`` at which no further group is begun.

    Returns:
        Seconds by signature, and what was raised by operations that do not run on random data.
    """
    found: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    for group in _groups(parts, room_bytes):
        if time.perf_counter() >= until:
            break
        weight_bytes = sum(part.nbytes for part in group if part.reads_weights)
        total_bytes = sum(part.nbytes for part in group)
        copies = min(_MOST_COPIES, -(-_WEIGHTS_IN_ALL_BYTES // max(weight_bytes, 1)), max(1, room_bytes // max(total_bytes, 1)))
        players = list(_players(group, copies, failed))
        _play(players, until)
        found.update((player.signature, statistics.median(player.seconds)) for player in players)
    return found, failed


def _groups(parts: list[Part], room_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    taken_bytes = 0
    for part in parts:
        if group and taken_bytes + part.nbytes > room_bytes:
            yield group
            group, taken_bytes = [], 0
        group.append(part)
        taken_bytes += part.nbytes
    if group:
        yield group


def _players(group: list[Part], copies: int, failed: dict[str, Exception]) -> Iterator[_Player]:
    for part in group:
        try:
            calls = [part.make(part.recipe) for _ in range(copies if part.reads_weights else 1)]
            for call in calls:
                call()  # prepares kernels
        except Exception as error:  # noqa: BLE001 -- an operation with random data may raise what it likes; the caller estimates it
            failed[part.signature] = error
            continue
        yield _Player(part.signature, calls)


def _play(players: list[_Player], until: float) -> None:
    held: deque[object] = deque(maxlen=_HELD_RESULTS)
    began = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        now = time.perf_counter()
        if turn >= _LEAST_ROUNDS and (now - began > _ENOUGH_S or now >= until):
            return
        for player in players:
            held.append(player.play(turn))
