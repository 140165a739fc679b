"""What runs in the process of a worker: opens the work once, does one task after the other, and answers with what happened, never with a
guess. Exceptions are answers, so that what went wrong reaches the driver in words even where its class does not exist there."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Protocol

from overflowml_core.errors import OverflowmlError
from overflowml_ray.errors import SetAside, WorkRefused
from overflowml_ray.nodes import Seat

DONE, REFUSED, ASIDE, NODE_ASIDE, FAULT = "done", "refused", "aside", "node aside", "fault"
"""Kinds of an answer: a result; the work is wrong; this worker cannot go on; nor can its node; anything else that was raised."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a worker: its kind, a value or words, and the seconds that it took."""

    kind: str
    value: Any = None
    words: str = ""
    took_s: float = 0.0


class Open(Protocol):
    """Work that is opened: a model is loaded."""

    def do(self, task: Any) -> Any:
        """The result of a task.

        Raises:
            SetAside: another worker may do it.
            WorkRefused: nobody will.
        """


class Work(Protocol):
    """What is to be done; it travels to the workers."""

    def open(self, seat: Seat) -> Open:
        """Load what all tasks need.

        Raises:
            SetAside, WorkRefused: as for a task.
        """

    def unit_s(self) -> float | None:
        """Predicted seconds of a task of cost 1 where it was opened, None where nobody knows."""


class Worker:
    """One process with one accelerator, or a whole node without any."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.opened: Open | None = None

    def hello(self) -> str:
        """That it is there."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def open(self, work: Work) -> Answer:
        """Load what the tasks need."""

        def opening() -> float | None:
            self.opened = work.open(self.seat)
            return work.unit_s()

        return _answer(opening)

    def do(self, task: Any) -> Answer:
        """Do one task."""
        assert self.opened is not None
        opened = self.opened
        return _answer(lambda: opened.do(task))


def _answer(call: Any) -> Answer:
    start_s = time.perf_counter()
    try:
        value = call()
    except SetAside as error:
        return Answer(NODE_ASIDE if error.whole_node else ASIDE, None, error.reason)
    except WorkRefused as error:
        return Answer(REFUSED, None, str(error))
    except OverflowmlError as error:
        return Answer(FAULT, None, str(error))
    except Exception as error:  # noqa: BLE001 -- a stranger's code; the driver decides what becomes of the task
        return Answer(FAULT, None, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    return Answer(DONE, value, "", time.perf_counter() - start_s)
