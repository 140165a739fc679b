"""How long planning takes, and in how much memory: full-size models by their configurations alone, rows of 100 to 10 000 blocks, and
the command line from a cold start.

    python benchmarks/plan_speed.py --json benchmarks/results/plan_speed.json

Each model is profiled and planned by the command line in a process of its own, with an empty cache and then again with what the first one
kept. Peak memory is the largest resident set of the process (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from report import Report

from overflowml_core.facts import Block, BlockWork, Component, Limits, Machine, Network, PassProfile, Work, Workload, network_fingerprint
from overflowml_core.inspect.named import named_machine
from overflowml_core.planner import make_plan

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "configs"
MODELS = ("flux.1-dev", "wan2.2-t2v-14b", "qwen-image", "hunyuanvideo", "llama-3.1-70b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b")
MACHINE = ("--gpu", "RTX 4090", "--ram", "1TB")
_MIB = 2**20


@dataclass(frozen=True)
class Ran:
    """One process: seconds from its start to its end, and its largest resident set in bytes."""

    seconds: float
    peak_bytes: int


def run(arguments: list[str], cache: str, fails: bool = False) -> Ran:
    """Run the command line once.

    Args:
        arguments: behind ``overflowml``.
        cache: the cache folder.
        fails: exit status 1 (it does not fit) is an answer too.
    """
    environment = {**os.environ, "OVERFLOWML_CACHE": cache}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "overflowml", *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in ((0, 1) if fails else (0,)):
        raise SystemExit(f"overflowml {' '.join(arguments)}: exit {process.returncode}\n{errors.decode()[-2000:]}")
    return Ran(seconds, usage.ru_maxrss * 1024)


def models(report: Report, rounds: int) -> None:
    """Profile and plan every configuration."""
    for name in MODELS:
        first, again = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                first.append(run(["plan", str(CONFIGS / name), *MACHINE], cache, fails=True))
                again.append(run(["plan", str(CONFIGS / name), *MACHINE], cache, fails=True))
        report.add(f"profile.{name}.seconds", statistics.median(r.seconds for r in first), "s")
        report.add(f"profile.{name}.again_seconds", statistics.median(r.seconds for r in again), "s")
        report.add(f"profile.{name}.peak_bytes", max(r.peak_bytes for r in first), "bytes")


def row_of_blocks(count: int) -> Network:
    """A denoiser of two kinds of blocks in turn, 96 GiB in all, whatever their number."""
    sizes = (128 * 2**30 // count // 512 * 512, 64 * 2**30 // count // 512 * 512)
    blocks = tuple(
        Block(f"blocks.{i}", sizes[i % 2] // 2, sizes[i % 2], sizes[i % 2], (("BF16", sizes[i % 2]),), linear_count=sizes[i % 2] // 2)
        for i in range(count)
    )
    works = [BlockWork((Work("matmul", "BF16", 4096 * size, 2 * size, size, 12),), 100 * _MIB) for size in sizes]
    profile = PassProfile("denoise", 28, 500 * _MIB, tuple(works[i % 2] for i in range(count)))
    component = Component("transformer", "Row", blocks, 0, 0, (), "transformer", 28, 500 * _MIB, "analytic", f"row-{count}", (profile,))
    return Network((component,), f"{count} blocks", "Row", network_fingerprint((component,)))


def blocks(report: Report, rounds: int) -> None:
    """Plan rows of blocks on a card that holds a sixth of them."""
    machine: Machine = named_machine("RTX 4090", ram_bytes=256 * 10**9)
    for count in (100, 1000, 10000):
        network = row_of_blocks(count)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            make_plan(network, machine, Workload(), Limits())
            seconds.append(time.perf_counter() - started)
        report.add(f"plan.blocks_{count}.seconds", statistics.median(seconds), "s")


def command_line(report: Report, rounds: int) -> None:
    """The first answer that anybody sees."""
    with tempfile.TemporaryDirectory() as cache:
        for name, arguments in {
            "plan40": ["plan", "40", "--compare"],
            "plan40_named": ["plan", "40", "--compare", "--gpu", "RTX 5090", "--ram", "194GB"],
            "version": ["--version"],
        }.items():
            seconds = [run(arguments, cache).seconds for _ in range(rounds)]
            report.add(f"cli.{name}.seconds", statistics.median(seconds), "s")


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of the models, three of everything else")
    options = parser.parse_args()
    report = Report("plan_speed")
    command_line(report, 3 if options.quick else 2 * options.rounds + 1)
    blocks(report, 3 if options.quick else options.rounds)
    models(report, 1 if options.quick else 3)
    report.write(options.json)


if __name__ == "__main__":
    main()
