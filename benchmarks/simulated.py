"""Passes on the virtual accelerator's clock against what no choice could beat: random rows of blocks, budgets and rates.

    python benchmarks/simulated.py

The planner chooses residents and staging; the engine runs the plan on the virtual accelerator (tests/vdevice: a simulated clock);
a pass in the rhythm of many is held against two bounds over all choices within the same budget, which take no account of the order of the
blocks, so that they cannot always be reached:

* ``bound``, of slots that are all as large as the largest streamed block: with two or more the longer of all computing and all copies, with
  one the copies and the computing of the streamed blocks, which exclude one another. Staging by bytes may beat it.
* ``floor``, of any staging at all, weights cut at any byte: all computing, or all copies and the time in which nothing can be copied, for a
  block computes for longer than filling the rest of the staging takes.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the tests' package is not on the path

from overflowml_core.facts import Accelerator, HostMemory, Limits, Machine, Network, Rates, Tier, Workload, network_fingerprint
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from overflowml_core.planner.cost import Spent
from overflowml_core.planner.machinery import Move
from overflowml_core.planner.residency import Residency
from overflowml_core.planner.rounds import Part, Round
from overflowml_core.planner.timed import Problem, choose_timed
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import StreamDevice
from overflowml_core.runtime.engine import Engine
from overflowml_core.work import PassProfile
from tests.vdevice import Config, SimDevice, install
from tests.vdevice.memory import span

UNIT_BYTES = 4096
"""Blocks are so many of these large."""

PASSES = 12
_PLENTY = 2**40


@dataclass(frozen=True)
class Case:
    """A row of blocks under a budget.

    Attributes:
        units: size of each block.
        seconds: what each computes.
        room_units: what residents and staging may take.
        link_bytes_per_s: rate of the copies.
    """

    units: tuple[int, ...]
    seconds: tuple[float, ...]
    room_units: int
    link_bytes_per_s: float

    @property
    def copies(self) -> tuple[float, ...]:
        """Seconds of the copy of each block."""
        return tuple(units * UNIT_BYTES / self.link_bytes_per_s for units in self.units)


class Busy(nn.Module):
    """A block whose computing takes so long on the virtual clock and reads its weight."""

    def __init__(self, units: int, seconds: float, device: SimDevice) -> None:
        super().__init__()
        self.inner = nn.ParameterList([nn.Parameter(torch.zeros(units * UNIT_BYTES // 4), requires_grad=False)])
        self.seconds = seconds
        self.device = [device]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (device,) = self.device
        with device.lock:
            stream = device.clock.begin("busy", [span(self.inner[0])], [])
            device.clock.place("compute", "busy", self.seconds, stream)
        return x


class Row(nn.Module):
    """Blocks in a row."""

    def __init__(self, case: Case, device: SimDevice) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Busy(*block, device) for block in zip(case.units, case.seconds, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def draw_case(draw: random.Random) -> Case:
    """Six to 48 blocks of one to three sizes or as many as there are blocks; computing in proportion to bytes or not; a link that is up to
    three times slower or faster than the computing; room from two of the largest block to nearly all."""
    count = draw.randint(6, 48)
    kinds = draw.choice([1, 2, 3, count])
    palette = [draw.randint(8, 64) for _ in range(kinds)]
    units = [palette[i] if kinds == count else draw.choice(palette) for i in range(count)]
    uneven = draw.random() < 0.5
    works = [size * (draw.uniform(0.3, 3) if uneven else 1.0) for size in units]
    compute_s = draw.uniform(0.05, 0.5)
    link_s = compute_s * 3 ** draw.uniform(-1, 1)
    least = min(1.0, 2 * max(units) / sum(units))
    return Case(
        units=tuple(units),
        seconds=tuple(compute_s * work / sum(works) for work in works),
        room_units=int(sum(units) * draw.uniform(least, 0.98)),
        link_bytes_per_s=sum(units) * UNIT_BYTES / link_s,
    )


def lower_bound_s(case: Case) -> float:
    """Seconds that a pass takes at least through equal slots, whatever is resident and however many there are."""
    compute_s, total = sum(case.seconds), sum(case.units)
    if total <= case.room_units:
        return compute_s
    copies = case.copies
    order = sorted(range(len(case.units)), key=lambda i: case.units[i])
    best_s = float("inf")
    sums = 1  # bit n: some of the smaller blocks are n units together
    saved_s = [0.0] * (case.room_units + 1)  # by room: copies and computing of the smaller blocks that fit into it
    for place, largest in enumerate(order):
        # This one is the largest that is streamed: all larger ones stay, of the smaller ones what fits.
        larger = order[place + 1 :]
        kept = sum(case.units[i] for i in larger)
        room = case.room_units - kept - 2 * case.units[largest]
        if room >= 0:
            kept_units = kept + (sums & ((1 << (room + 1)) - 1)).bit_length() - 1
            best_s = min(best_s, max(compute_s, (total - kept_units) * UNIT_BYTES / case.link_bytes_per_s))
        room = case.room_units - kept - case.units[largest]
        if room >= 0:
            streamed = order[: place + 1]
            alone_s = sum(copies[i] + case.seconds[i] for i in streamed) - saved_s[room]
            best_s = min(best_s, max(compute_s, alone_s))
        size, worth_s = case.units[largest], copies[largest] + case.seconds[largest]
        sums |= sums << size
        for units in range(case.room_units, size - 1, -1):
            saved_s[units] = max(saved_s[units], saved_s[units - size] + worth_s)
    return best_s


def floor_s(case: Case) -> float:
    """Seconds that a pass takes at least, whatever is resident and however the streamed blocks pass through what is left of the room."""
    compute_s, total = sum(case.seconds), sum(case.units)
    if total <= case.room_units:
        return compute_s
    units_per_s = case.link_bytes_per_s / UNIT_BYTES
    blocks = list(zip(case.units, case.seconds, strict=True))
    # With more than this nothing is gained: the rest of the staging takes longer to fill than any block computes.
    most = int(max(units + seconds * units_per_s for units, seconds in blocks)) + 1
    best_s = float("inf")
    for staging in range(min(case.units), min(case.room_units, most) + 1):
        room = case.room_units - staging - sum(units for units in case.units if units > staging)
        if room < 0:
            continue
        saved_s = np.zeros(room + 1)  # by room: copies and idle time of the blocks that stay in it
        busy_s = 0.0
        for units, seconds in blocks:
            if units > staging:
                continue
            worth_s = units / units_per_s + max(0.0, seconds - (staging - units) / units_per_s)
            busy_s += worth_s
            if units <= room:
                saved_s[units:] = np.maximum(saved_s[units:], saved_s[: room + 1 - units] + worth_s)
        best_s = min(best_s, max(compute_s, busy_s - float(saved_s[room])))
    return best_s


def choose(case: Case) -> Residency:
    """The planner's choice."""
    part = Part("row", PassProfile("pass", PASSES, 0), tuple(range(len(case.units))), case.seconds, Spent(sum(case.seconds), 0.0))
    moves = [Move(seconds, nbytes=units) for seconds, units in zip(case.copies, case.units, strict=True)]
    still = [0.0] * len(case.units)
    owners = range(len(case.units))
    problem = Problem(case.units, owners, case.room_units, [Round("pass", PASSES, (part,))], moves, still, 0.0, False, False)
    chosen = choose_timed(problem)
    assert chosen is not None, "the largest block does not fit"
    return chosen


def simulated_s(case: Case, chosen: Residency) -> float:
    """A pass of the real engine in the rhythm of many, on the virtual clock."""
    sim = install(Config(h2d_bytes_per_s=case.link_bytes_per_s, flop_per_s=1e30, memory_bytes_per_s=1e30, hazards="raise"))
    row = Row(case, sim).eval()
    device = StreamDevice(torch.device("vgpu"))
    component = describe_module(row, "row")
    network = Network((component,), "benchmark", "Row", network_fingerprint((component,)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engine = Engine(_plan(network, case, chosen), network, device, Path(folder)).attach({"row": row}, None)
        x = torch.zeros(1, device="vgpu")
        ends = []
        for _ in range(PASSES):
            row(x)
            ends.append(sim.clock.streams[0].time_s)
        engine.detach()
    half = PASSES // 2
    return (ends[-1] - ends[half - 1]) / (PASSES - half)


def _plan(network: Network, case: Case, chosen: Residency) -> Plan:
    machine = Machine(
        (Accelerator("vgpu", "Virtual", 0, _PLENTY, _PLENTY),), HostMemory(_PLENTY, _PLENTY, _PLENTY, 2), Rates(1e9, 1e9, 1e9), 0
    )
    budget = case.room_units * UNIT_BYTES
    plan = make_plan(network, machine, Workload(), Limits.exactly(device_memory=budget, reserve=0))
    (phase,) = plan.phases
    tiers = [Tier.DEVICE if stays else Tier.PINNED for stays in chosen.resident]
    placements = tuple(dataclasses.replace(p, tier=tier, home=tier) for p, tier in zip(phase.placements, tiers, strict=True))
    phase = dataclasses.replace(
        phase, placements=placements, staging_bytes=chosen.staging_bytes * UNIT_BYTES, slot_bytes=chosen.slot_bytes * UNIT_BYTES
    )
    assert phase.device_bytes <= budget
    return dataclasses.replace(plan, strategy="stream", phases=(phase,), fingerprint="")


def measure(cases: int = 50, seed: int = 0) -> dict[str, Any]:
    """Run random rows.

    Args:
        cases: how many.
        seed: of the random numbers.

    Returns:
        ``max_over_bound`` and ``mean_over_bound``, ``within`` (the share of cases within 1.03 of the bound), the same of the floor
        (``max_over_floor``, ``within_floor``), and ``table``: of each case the blocks, the streamed ones, staging in blocks of the largest
        size, seconds of computing and of copies, the bound, the simulated pass, and its ratios to bound and floor.
    """
    table = []
    for number in range(cases):
        case = draw_case(random.Random(seed * 1000 + number))
        chosen, bound_s, least_s = choose(case), lower_bound_s(case), floor_s(case)
        pass_s = simulated_s(case, chosen)
        streamed = [seconds for seconds, stays in zip(case.copies, chosen.resident, strict=True) if not stays]
        row = {
            "blocks": len(case.units),
            "streamed": len(streamed),
            "staging": chosen.staging_bytes / max(chosen.slot_bytes, 1),
            "compute_s": sum(case.seconds),
        }
        table.append(
            {
                **row,
                "copies_s": sum(streamed),
                "bound_s": bound_s,
                "pass_s": pass_s,
                "over_bound": pass_s / bound_s,
                "over_floor": pass_s / least_s,
            }
        )
    over = [row["over_bound"] for row in table]
    within = sum(ratio <= 1.03 for ratio in over) / len(over)
    above = [row["over_floor"] for row in table]
    floors = {"max_over_floor": max(above), "within_floor": sum(ratio <= 1.03 for ratio in above) / len(above)}
    return {"max_over_bound": max(over), "mean_over_bound": sum(over) / len(over), "within": within, **floors, "table": table}


def _show(table: Sequence[dict[str, Any]]) -> None:
    print(f"{'blocks':>7}{'streamed':>9}{'staging':>9}{'compute':>10}{'copies':>10}{'bound':>10}{'pass':>10}{'over':>8}{'floor':>8}")
    for row in table:
        seconds = "".join(f"{row[name]:10.4f}" for name in ("compute_s", "copies_s", "bound_s", "pass_s"))
        print(f"{row['blocks']:7}{row['streamed']:9}{row['staging']:9.2f}{seconds}{row['over_bound']:8.3f}{row['over_floor']:8.3f}")


if __name__ == "__main__":
    found = measure()
    _show(found["table"])
    print(f"max {found['max_over_bound']:.3f}, mean {found['mean_over_bound']:.3f}, within 1.03: {found['within']:.0%}")
    print(f"over the floor: max {found['max_over_floor']:.3f}, within 1.03: {found['within_floor']:.0%}")
