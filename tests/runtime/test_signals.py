"""Real signals at random moments: after each the same call is right, and nothing hangs (a process that does dumps its tracebacks)."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.runtime.signalled import HANG_S

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = 25

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def bombard(folder: Path, signals: int, seed: int) -> tuple[int, list[str], str]:
    """Status, lines and errors of a process that was sent SIGINT and SIGTERM until it had met so many."""
    rng = random.Random(seed)
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.signalled", str(folder), str(signals)], cwd=ROOT, stdout=out, stderr=err
        )
        try:
            while process.poll() is None and "ready" not in (folder / "out").read_text():
                time.sleep(0.01)
            while process.poll() is None and "ended" not in (folder / "out").read_text():
                time.sleep(rng.uniform(0.0005, 0.03))
                process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
            process.wait(HANG_S)
        finally:
            process.kill()
    return process.returncode, (folder / "out").read_text().splitlines(), (folder / "err").read_text()


def test_a_process_that_meets_signals_goes_on_with_right_results(tmp_path: Path) -> None:
    status, lines, errors = bombard(tmp_path, SIGNALS, seed=5)
    assert status == 0, errors
    assert lines[-1] == "ended", errors
    kinds = Counter(line.split()[1] for line in lines if line.startswith("met"))
    assert sum(kinds.values()) >= SIGNALS
    assert min(kinds["KeyboardInterrupt"], kinds["Terminated"]) > SIGNALS // 5
