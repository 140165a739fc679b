"""The scheduling policy of ``overflowml run --ray`` on a simulated cluster of 1 000 unlike nodes, with and without failures.

    python benchmarks/cluster_sim.py --json benchmarks/results/cluster_sim.json --table benchmarks/results/cluster_sim.md

It is the very module that the driver uses (``overflowml_ray.policy``); only time, network and nodes are simulated.

Note [cluster]. The rates of nodes are spread evenly over the logarithm, ten times from the slowest to the fastest, which takes 2 s for a
task; tasks differ by a factor that nobody knows before (a lognormal one with a mean of 1 and a deviation of 0.1), and a node may take
another 3 % more or less for each. The policy is told no rates. Each message takes 0.5 to 50 ms, evenly over the logarithm, and 0.3 ms of
the only driver, one after the other. A node that fails does so at a moment drawn evenly from the lower bound, for good; the driver hears
of it 5 to 10 s later.

Note [bound]. All the work divided by all rates: what a cluster could do whose tasks can be cut anywhere, whose network takes no time and
whose nodes do not fail. Where nodes fail it is still that of all nodes, so that what they could not do counts as well.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from report import Report

from overflowml_ray.policy import Scheduler

FASTEST_S = 2.0
DRIVER_S = 0.3e-3
TICK_S = 1.0
LIMITS = {0.0: 1.05, 0.05: 1.15}
"""Of the median makespan over the bound, by the share of nodes that fail."""


@dataclass(frozen=True)
class Case:
    """A cluster and what it is to do."""

    nodes: int = 1000
    tasks_per_node: int = 50
    failing: float = 0.0
    seed: int = 0
    spread: float = 10.0
    ends_well: bool = True
    copies: bool = True


@dataclass(frozen=True)
class Outcome:
    """What came of it; shares are of all work that nodes did, lost work is that of nodes that failed.

    Attributes:
        over_bound: makespan over the bound.
        lost: share that was lost with nodes.
        doubled: share that went into copies that came second.
        redone: tasks that were given out again.
        messages: of the driver and to it, for a task.
        done: tasks with a result that counts; each must have one.
        counted_twice: tasks with more than one, which must not be.
        driver_busy: share of the makespan in which the driver handled messages.
        policy_us: microseconds of this machine's processor that the policy took for a task.
    """

    over_bound: float
    lost: float
    doubled: float
    redone: int
    messages: float
    done: int
    counted_twice: int
    driver_busy: float
    policy_us: float


class Cluster:
    """Nodes, a network and a driver on a clock of their own."""

    def __init__(self, case: Case) -> None:
        self.case, self.dice = case, random.Random(case.seed)
        self.unit_s = [FASTEST_S * case.spread ** self.dice.random() for _ in range(case.nodes)]
        count = case.nodes * case.tasks_per_node
        self.sizes = [self.dice.lognormvariate(-0.005, 0.1) for _ in range(count)]
        self.bound_s = sum(self.sizes) / sum(1 / unit_s for unit_s in self.unit_s)
        failing = self.dice.sample(range(case.nodes), round(case.failing * case.nodes))
        self.fails_s = {node: self.dice.uniform(0, self.bound_s) for node in failing}
        self.policy = Scheduler([1.0] * count, ends_well=case.ends_well, copies=case.copies)
        self.queues: list[list[int]] = [[] for _ in range(case.nodes)]
        self.working: list[tuple[int, float] | None] = [None] * case.nodes
        self.events: list[tuple[float, int, str, int, int, float]] = []
        self.order = itertools.count()
        self.driver_free_s = self.driver_s = self.policy_s = 0.0
        self.done_s = self.lost_s = self.doubled_s = 0.0
        self.counted = [0] * count

    def run(self) -> Outcome:
        """Until every task has a result."""
        for node in range(self.case.nodes):
            self._at(self._latency_s(), "joins", node)
        for node, moment_s in self.fails_s.items():
            self._at(moment_s, "fails", node)
        self._at(TICK_S, "ticks")
        makespan_s = 0.0
        while not self.policy.is_done:
            now_s, _, kind, node, task, took_s = heapq.heappop(self.events)
            makespan_s = now_s
            getattr(self, f"_{kind}")(now_s, node, task, took_s)
        count, all_s = len(self.sizes), self.done_s + self.lost_s + self.doubled_s
        return Outcome(
            makespan_s / self.bound_s,
            self.lost_s / all_s,
            self.doubled_s / all_s,
            self.policy.counts.redone,
            self.policy.counts.messages / count,
            sum(1 for one in self.counted if one),
            sum(1 for one in self.counted if one > 1),
            self.driver_s / makespan_s,
            self.policy_s / count * 1e6,
        )

    # ---- what happens at nodes

    def _reaches(self, now_s: float, node: int, task: int, _: float) -> None:
        if not self._is_dead(node, now_s):
            self.queues[node].append(task)
            self._begin(now_s, node)

    def _takes_back(self, now_s: float, node: int, task: int, _: float) -> None:
        if task in self.queues[node]:
            self.queues[node].remove(task)

    def _begin(self, now_s: float, node: int) -> None:
        if self.working[node] is None and self.queues[node]:
            task = self.queues[node].pop(0)
            self.working[node] = task, now_s
            took_s = self.unit_s[node] * self.sizes[task] * self.dice.uniform(0.97, 1.03)
            self._at(now_s + took_s, "computed", node, task, took_s)

    def _computed(self, now_s: float, node: int, task: int, took_s: float) -> None:
        if self._is_dead(node, now_s):
            return
        self.working[node] = None
        self._send(now_s, "hears", node, task, took_s)
        self._begin(now_s, node)

    def _fails(self, now_s: float, node: int, _: int, __: float) -> None:
        if self.working[node] is not None:
            self.lost_s += now_s - self.working[node][1]
        self._at(now_s + self.dice.uniform(5, 10), "misses", node)

    def _is_dead(self, node: int, now_s: float) -> bool:
        return self.fails_s.get(node, math.inf) <= now_s

    # ---- what happens at the driver

    def _joins(self, now_s: float, node: int, _: int, __: float) -> None:
        self._decide(now_s, lambda: self.policy.join(str(node), now_s))

    def _misses(self, now_s: float, node: int, _: int, __: float) -> None:
        self._decide(now_s, lambda: self.policy.leave(str(node), now_s))

    def _ticks(self, now_s: float, _: int, __: int, ___: float) -> None:
        self._decide(now_s, lambda: None)
        self._at(now_s + TICK_S, "ticks")

    def _hears(self, now_s: float, node: int, task: int, took_s: float) -> None:
        def hear() -> None:
            result = self.policy.finished(str(node), task, now_s, took_s)
            self.counted[task] += result.counts
            if result.counts:
                self.done_s += took_s
            else:
                self.doubled_s += took_s
            for back in result.withdrawn:
                self._send(now_s, "takes_back", int(back.worker), back.task)

        self.driver_s += DRIVER_S
        self._decide(now_s, hear)

    def _decide(self, now_s: float, happened: object) -> None:
        start_s = time.perf_counter()
        happened()  # type: ignore[operator]
        granted = self.policy.grants(now_s)
        self.policy_s += time.perf_counter() - start_s
        for grant in granted:
            self.driver_s += DRIVER_S
            self._send(now_s, "reaches", int(grant.worker), grant.task)

    # ---- the network

    def _send(self, now_s: float, kind: str, node: int, task: int, took_s: float = 0.0) -> None:
        """A message, which the driver handles as the sender or the receiver, when it has handled those before it."""
        latency_s = self._latency_s()
        arrives_s = now_s + latency_s if kind == "hears" else now_s
        self.driver_free_s = max(self.driver_free_s, arrives_s) + DRIVER_S
        self._at(self.driver_free_s + (0.0 if kind == "hears" else latency_s), kind, node, task, took_s)

    def _latency_s(self) -> float:
        return 0.5e-3 * 100 ** self.dice.random()

    def _at(self, moment_s: float, kind: str, node: int = -1, task: int = -1, took_s: float = 0.0) -> None:
        heapq.heappush(self.events, (moment_s, next(self.order), kind, node, task, took_s))


def static_over_bound(case: Case) -> float:
    """Makespan over the bound where every node is given the same number of tasks, which is what a division without pulling does."""
    cluster = Cluster(replace(case, failing=0.0))
    ends = [0.0] * case.nodes
    for task, size in enumerate(cluster.sizes):
        ends[task % case.nodes] += size * cluster.unit_s[task % case.nodes]
    return max(ends) / cluster.bound_s


WAYS = {
    "the policy": {},
    "without copies": {"copies": False},
    "whoever is free takes the next": {"ends_well": False, "copies": False},
}


def measure(report: Report, cases: dict[str, list[Case]]) -> tuple[list[list[str]], list[str]]:
    """Run all cases.

    Returns:
        The rows of the table, and what is wrong.
    """
    rows, faults = [], []
    for name, several in cases.items():
        outcomes = [Cluster(case).run() for case in several]
        case, count = several[0], several[0].nodes * several[0].tasks_per_node
        over = [one.over_bound for one in outcomes]
        key = f"{name.partition(' of ')[0].replace(' ', '_')}.{case.tasks_per_node}_a_node.{round(100 * case.failing)}_percent"
        for figure, values, unit in (
            ("over_bound", over, "x"),
            ("lost", [one.lost for one in outcomes], "share"),
            ("doubled", [one.doubled for one in outcomes], "share"),
            ("redone", [float(one.redone) for one in outcomes], "tasks"),
            ("messages", [one.messages for one in outcomes], "a task"),
            ("driver_busy", [one.driver_busy for one in outcomes], "share"),
            ("policy", [one.policy_us for one in outcomes], "us a task"),
        ):
            report.add(f"{key}.{figure}", statistics.median(values), unit)
        report.add(f"{key}.over_bound_worst", max(over), "x")
        middle = outcomes[sorted(range(len(over)), key=over.__getitem__)[len(over) // 2]]
        rows.append(
            [
                name.partition(" of ")[0],
                str(case.tasks_per_node),
                f"{case.failing:.0%}",
                f"{statistics.median(over):.3f}",
                f"{max(over):.3f}",
                f"{middle.lost:.2%}",
                str(middle.redone),
                f"{middle.doubled:.2%}",
                f"{middle.messages:.3f}",
            ]
        )
        if any(one.done != count or one.counted_twice for one in outcomes):
            faults.append(f"{key}: a task without a result, or with two")
        if case.copies and case.ends_well and case.tasks_per_node >= 50 and max(over) > LIMITS[case.failing]:
            faults.append(f"{key}: {max(over):.3f} over {LIMITS[case.failing]}")
    return rows, faults


def main() -> None:
    """Run it, print the table, and end with status 1 where a limit is not kept or a task has not exactly one result."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--nodes", type=int, default=1000)
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--quick", action="store_true", help="one seed, fewer tasks")
    asked.add_argument("--json", type=Path)
    asked.add_argument("--table", type=Path)
    given = asked.parse_args()
    seeds = range(1 if given.quick else given.seeds)
    cases = {}
    for tasks in (20, 50) if given.quick else (20, 50, 100):
        for failing in LIMITS:
            for way, how in WAYS.items():
                if way != "the policy" and (tasks != 50 or failing):
                    continue
                cases[f"{way} of {tasks} {failing}"] = [Case(given.nodes, tasks, failing, seed, **how) for seed in seeds]
    report = Report("cluster_sim")
    rows, faults = measure(report, cases)
    shares = statistics.median(static_over_bound(Case(given.nodes, 50, seed=seed)) for seed in seeds)
    report.add("equal_shares.50_a_node.over_bound", shares, "x")
    table = _table(rows, shares, given.nodes, len(seeds))
    print(table)
    report.write(given.json)
    if given.table is not None:
        given.table.write_text(table)
    for fault in faults:
        print(f"FAULT: {fault}")
    sys.exit(1 if faults else 0)


def _table(rows: list[list[str]], shares: float, nodes: int, seeds: int) -> str:
    heads = [
        "way",
        "tasks a node",
        "nodes that fail",
        "makespan / bound",
        "worst",
        "work lost",
        "tasks redone",
        "work doubled",
        "messages a task",
    ]
    lines = [f"{nodes} nodes whose rates are spread ten times, {seeds} seeds: medians, and the worst makespan.", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [f"| equal shares | 50 | 0% | {shares:.3f} | | | | | |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
