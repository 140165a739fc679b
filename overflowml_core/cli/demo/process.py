"""Starts a run in a process of its own, hands its reports on, and brings its result back or says how it failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.cases import BUILD, MARKER
from overflowml_core.cli.demo.faults import ChildFailed
from overflowml_core.cli.demo.results import Measured
from overflowml_core.environment import DEVICE_MEMORY, HOST_MEMORY, RESERVE

_CHILD = "overflowml_core.cli.demo.child"
_PATIENCE_S = 1800.0
_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        case: name of the case.
        mode: BUILD, DIRECT or MANAGED of ``cases.py``.
        folder: of the model.
        work: a folder of its own, for its result and its files.
        budget_bytes: of a managed run.
        reserve_bytes: of the budget, for activations.
    """

    case: str
    mode: str
    folder: Path
    work: Path
    budget_bytes: int | None = None
    reserve_bytes: int = 0

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.case}, {self.mode}"

    def arguments(self) -> list[str]:
        """The command, for this interpreter; no shell sees it."""
        command = [sys.executable, "-m", _CHILD, "--case", self.case, "--mode", self.mode]
        command += ["--folder", str(self.folder), "--work", str(self.work)]
        return command if self.budget_bytes is None else [*command, "--budget-bytes", str(self.budget_bytes)]

    def environment(self) -> dict[str, str]:
        """This process's environment, without a budget of the user's own, and with ours in a managed run."""
        environment = {name: value for name, value in os.environ.items() if name not in (DEVICE_MEMORY, HOST_MEMORY, RESERVE)}
        # The child imports the same packages as its parent, also where the parent's path was set by hand.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["HF_HUB_OFFLINE"] = "1"  # every file is local; nothing waits for a network that is not there
        environment["TOKENIZERS_PARALLELISM"] = "false"
        # Without it MKL takes other kernels on some processors where memory is aligned otherwise, and bits of two plain runs differ.
        environment.setdefault("MKL_CBWR", "AUTO,STRICT")
        if self.budget_bytes is not None:
            environment[DEVICE_MEMORY] = f"{self.budget_bytes}B"
            environment[RESERVE] = f"{self.reserve_bytes}B"
        return environment


def run_job(job: Job, watch: Callable[[dict[str, Any]], None]) -> Measured | None:
    """Run a job to its end.

    Args:
        job: what to run; its ``work`` folder exists.
        watch: is given each report of the child, as it comes.

    Returns:
        What it measured; None where it built files.

    Raises:
        ChildFailed: it ended without a result.
    """
    status, stderr_tail = stream(job.arguments(), job.environment(), job.work, watch)
    if status != 0:
        raise ChildFailed(job.title, status, stderr_tail)
    if job.mode == BUILD:
        return None
    try:
        return Measured.from_json((job.work / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChildFailed(job.title, status, f"{stderr_tail}\nno readable result ({error})") from error


def stream(
    command: Sequence[str],
    environment: dict[str, str],
    work: Path,
    watch: Callable[[dict[str, Any]], None],
    patience_s: float = _PATIENCE_S,
) -> tuple[int | None, str]:
    """Run a command and hand its reports to ``watch`` line by line.

    Returns:
        The exit status, None where it took longer than ``patience_s`` seconds; and the last lines of its standard error.
    """
    late = threading.Event()
    # Standard error goes to a file: two pipes read by one thread can block each other.
    with (work / "stderr.txt").open("w+b") as stderr:
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process:

            def give_up() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(patience_s, give_up)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    event = _event(line)
                    if event is not None:
                        watch(event)
                status = process.wait()
            finally:
                timer.cancel()
                if process.poll() is None:  # the parent was interrupted: no orphan keeps computing
                    process.kill()
        stderr.seek(0)
        tail = b"".join(deque(stderr, maxlen=_TAIL_LINES)).decode("utf-8", "replace")
    return (None if late.is_set() else status), tail


def _event(line: bytes) -> dict[str, Any] | None:
    marker = MARKER.encode()
    if not line.startswith(marker):
        return None
    try:
        event = json.loads(line[len(marker) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
