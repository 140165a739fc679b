"""``python -m tests.inspect.fuzz --count 100000`` throws as many malformed files as wanted at every parser; the test suite runs a few.

Each parser's module says what must hold. For all of them: never another exception than the parser's own, never a second for one input,
never much memory.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.inspect import fuzz_documents, fuzz_gguf, fuzz_headers

LARGEST_PROCESS_BYTES = 8 * 2**30
"""Address space of the whole run, libraries included."""
LONGEST_S = 1.0
"""For one input; most take a thousandth."""

Make = Callable[[random.Random], bytes]
Check = Callable[[Path, bytes], str]


def parsers() -> dict[str, tuple[Make, Check]]:
    """By name, what makes inputs for a parser and what checks it."""
    found: dict[str, tuple[Make, Check]] = {
        "safetensors": (fuzz_headers.make_input, fuzz_headers.check),
        "gguf": (fuzz_gguf.make_input, fuzz_gguf.check),
    }
    return found | {name: (reader.make_input, reader.check) for name, reader in fuzz_documents.readers().items()}


def main() -> int:
    """Run the inputs and print how many were accepted and refused; 1 if a rule was broken."""
    known = parsers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="how many inputs for each parser")
    parser.add_argument("--seed", type=int, default=0, help="of the random generator")
    parser.add_argument("--parser", choices=tuple(known), action="append", help="which of them; all where none is named")
    parser.add_argument("--trace-memory", action="store_true", help="also hold the peak of Python's allocations against a limit (slower)")
    options = parser.parse_args()
    _limit_memory()
    print(f"{'parser':<12} {'inputs':>8} {'accepted':>9} {'refused':>9} {'broken':>7} {'slowest':>9} {'peak':>12}")  # noqa: T201
    broken = [_run(name, *known[name], options) for name in options.parser or known]
    return int(sum(broken) > 0)


def _limit_memory() -> None:
    """Make an allocation by what a header claims fail, instead of filling the machine; where the system can."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_PROCESS_BYTES, LARGEST_PROCESS_BYTES))


def _run(name: str, make: Make, check: Check, options: argparse.Namespace) -> int:
    """One parser's inputs; how often its rule was broken."""
    rng = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    slowest_s = 0.0
    if options.trace_memory:
        tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzz.{name}"
        for _ in range(options.count):
            raw = make(rng)
            begun = time.monotonic()
            try:
                outcome = check(path, raw)
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is a finding
                outcome = "BROKEN"
                print(f"{type(error).__name__}: {error}\n  input: {raw!r}")  # noqa: T201
            taken_s = time.monotonic() - begun
            slowest_s = max(slowest_s, taken_s)
            if taken_s > LONGEST_S:
                outcome = "BROKEN"
                print(f"took {taken_s:.1f} s\n  input: {raw!r}")  # noqa: T201
            outcomes[outcome] += 1
    peak = ""
    if options.trace_memory:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peak = f"{peak_bytes} B"
        outcomes["BROKEN"] += peak_bytes > fuzz_headers.LARGEST_ALLOCATION_BYTES
    refused = outcomes["refused"] + outcomes["stricter"]
    counts = f"{options.count:>8} {outcomes['accepted']:>9} {refused:>9} {outcomes['BROKEN']:>7}"
    print(f"{name:<12} {counts} {1000 * slowest_s:>6.1f} ms {peak:>12}")  # noqa: T201
    return outcomes["BROKEN"]


if __name__ == "__main__":
    sys.exit(main())
