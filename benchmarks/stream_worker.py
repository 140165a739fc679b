"""The parent's end of a side's process: starts it, tells it what to do, waits for at most so long, ends it in any case."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream_system import Cage, read_bytes_of

ANSWER_S = 1200.0
"""Nothing that a side is asked to do takes longer, unless it hangs."""
_QUIET_S = 0.05
_ERROR_CHARACTERS = 600


class SideFailed(Exception):
    """A side could not do what it was told."""


class Worker:
    """A process that runs stream_side.py, or another script that serves commands as it does.

    Args:
        name: of the side.
        log: a file for what it prints.
        python: an interpreter that has what the side needs.
        cage: the group whose memory limit it lives under, None for none.
        answer_s: longest wait for an answer.
        script: that it runs, beside this one.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        python: str = sys.executable,
        cage: Cage | None = None,
        answer_s: float = ANSWER_S,
        script: str = "stream_side.py",
    ) -> None:
        self.name = name
        self._log = log
        self._answer_s = answer_s
        self._pending = b""
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name(script))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                bufsize=0,
                cwd=log.parent,
                env=_environment(log.parent),
                start_new_session=True,  # an interrupt is the parent's, which then ends this
            )
        try:
            if cage is not None:
                cage.add(self._process.pid)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ready(self, imports: Sequence[str], threads: int = 0) -> dict[str, Any]:
        """Import packages; ``threads`` of 0 leaves torch's own choice."""
        return self.ask("ready", imports=list(imports), threads=threads)

    def load(self, side: str, model: Path, scratch: Path, budget_bytes: int) -> dict[str, Any]:
        """Load a model as this side does."""
        scratch.mkdir(parents=True, exist_ok=True)
        return self.ask("load", side=side, model=str(model), scratch=str(scratch), budget_bytes=budget_bytes)

    def passes(self, count: int, untimed: int = 0, logits: Path | None = None) -> dict[str, Any]:
        """Run passes one behind the other and, where a file is given, leave the last one's logits there.

        Args:
            count: passes to time.
            untimed: passes before them.
            logits: gets float32 numbers.
        """
        return self.ask("passes", count=count, untimed=untimed, logits=str(logits) if logits else None)

    def forget(self, files: Sequence[Path]) -> None:
        """Have it let go of its pages of these files."""
        self.ask("forget", files=[str(file) for file in files])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done.

        Raises:
            SideFailed: it cannot, it ended, or it takes too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            raise SideFailed(self._why_ended()) from None
        answer: dict[str, Any] = json.loads(self._line(do))
        if "error" in answer:
            raise SideFailed(answer["error"][:_ERROR_CHARACTERS])
        return answer

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self._answer_s
        while b"\n" not in self._pending:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise SideFailed(f"{do}: no answer within {self._answer_s:.0f} s")
            got = os.read(descriptor, 1 << 16)
            if not got:
                raise SideFailed(self._why_ended())
            self._pending += got
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _why_ended(self) -> str:
        code = self._process.wait()
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        # A memory limit that is too small for a side shows as a kill by the kernel.
        return f"{why}: {self._log.read_text('utf-8', 'replace')[-_ERROR_CHARACTERS:].strip() or 'it printed nothing'}"

    def wait_until_quiet(self, longest_s: float = 10.0) -> None:
        """Until it reads nothing more from the disk: a side may fetch ahead for a pass that is not asked for yet."""
        before = read_bytes_of(self.pid)
        deadline = time.monotonic() + longest_s
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            now = read_bytes_of(self.pid)
            if now == before:
                return
            before = now

    def close(self) -> None:
        """End it, with all processes that it started. A second call does nothing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _environment(folder: Path) -> dict[str, str]:
    """Of a side: bits are comparable, nothing is asked of the Hub, and no calibration of this machine is used or left behind."""
    own = {
        "MKL_CBWR": "AUTO,STRICT",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OVERFLOWML_CACHE": str(folder / "cache"),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OVERFLOWML_")}
    return {**inherited, **own}
