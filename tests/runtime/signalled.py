"""A process that loads, runs and gives back a model until so many signals fell into that: after each, the same again must be right.

    python -m tests.runtime.signalled FOLDER SIGNALS

Says "ready" once it may be sent signals, then "met KIND STAGE" for each that it lived through, and "ended" at the end.
"""

from __future__ import annotations

import faulthandler
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import Job, job, on_meta, rows, same, save, slots_budget, stack

HANG_S = 50
_is_armed = False
_met = 0


class Terminated(BaseException):
    """What a server's handler of SIGTERM raises."""


def _say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def _answer(number: int, frame: FrameType | None) -> None:
    global _is_armed
    if _is_armed:
        _is_armed = False
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _insist(stage: str, work: Callable[[], Any]) -> Any:
    """Do something as often as a signal falls into it."""
    global _is_armed, _met
    while True:
        try:
            _is_armed = True
            result = work()
            _is_armed = False
            return result
        except (KeyboardInterrupt, Terminated) as error:
            _met += 1
            _say(f"met {type(error).__name__} {stage}")


class Server:
    """Two phases that are streamed from files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plain: dict[str, nn.Module] = {name: stack(4, 16, seed=k, ends=True) for k, name in enumerate(("one", "two"))}
        self._expected = {name: module(rows()) for name, module in self._plain.items()}
        self._files = {name: save(dict(m.named_parameters()), folder / f"{name}.safetensors") for name, m in self._plain.items()}

    def _task(self) -> Job:
        one, loading = on_meta(self._plain["one"], self._files["one"])
        two, other = on_meta(self._plain["two"], self._files["two"])
        loading.origins |= other.origins
        modules = {"one": one, "two": two}
        return job(modules, HostDevice(), budget_bytes=slots_budget(self._plain["one"], 2), tier="disk", loading=loading)

    def live(self, passes: int) -> None:
        """Load, run so many passes, give back."""
        task = self._task()
        engine: Engine = _insist("load", lambda: task.attach(self._folder / "store"))
        for k in range(passes):
            self._check(task, ("one", "two")[k // 2 % 2])
        _insist("remove", engine.detach)
        for name in self._plain:
            self._check(task, name)

    def _check(self, task: Job, name: str) -> None:
        result = _insist("pass", lambda: task.modules[name](rows()))
        if not same(result, self._expected[name]):
            raise AssertionError(f"another result of {name} after {_met} signals")


def main(folder: Path, signals: int) -> None:
    """Live until so many signals were met."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    server = Server(folder)
    server.live(4)  # what is imported late is there by now
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _answer)
    _say("ready")
    deadline = time.monotonic() + HANG_S
    while _met < signals and time.monotonic() < deadline:
        server.live(12)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # while Python ends it would take other handlers away, and be ended by them
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("overflowml")]
    if left:
        raise AssertionError(f"threads are left: {left}")
    _say("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
