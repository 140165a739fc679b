"""How good a plan is after its trial, where it was made with wrong rates: on the simulated clock, against the best of all splits.

    python benchmarks/trials.py

Each case is a row of unequal blocks, a budget, and a virtual accelerator whose true rates the planner is not told: its calibration is
wrong by up to a factor of three, of the link and of computing apart. The trial runs in the passes of the model; afterwards a pass under the
kept plan is held against the best of an exhaustive sweep over which blocks stay and how large the staging buffer is, within the same
budget. The sweep is simulated with the true rates, and the engine runs its winner, too: both must end at the same time.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from overflowml_core.facts import BlockWork, ComputeRate, Machine, Network, PassProfile, Rates, Work, Workload, network_fingerprint
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from overflowml_core.planner.machinery import Lane, Machinery, Move
from overflowml_core.planner.trial import Contest
from overflowml_core.runtime.trial import Trial
from tests.runtime.build import job, virtual
from tests.vdevice import Config, SimDevice, install

WIDTH, ROWS = 32, 16
_ALIGN_BYTES = 512
_MOST_PASSES = 40
"""In which a trial must have come to its end: four plans of three passes each take twelve."""

Split = tuple[tuple[bool, ...], int]
"""Which blocks stay, and bytes of the staging buffer."""


class Repeated(nn.Module):
    """A block that computes so many times with the same weights, so that its time does not follow from its bytes."""

    def __init__(self, hidden: int, repeats: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)
        self.repeats = repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.repeats):
            x = self.down(self.up(x))
        return x


class Row(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Case:
    """One row of blocks with its true rates, and how far the calibration is off.

    Attributes:
        hidden, repeats: of each block.
        share: of the room between a slot for the largest block and everything, what is granted.
        link_bytes_per_s, flop_per_s: the true rates.
        link_off, compute_off: what the calibration says over what is true.
    """

    hidden: tuple[int, ...]
    repeats: tuple[int, ...]
    share: float
    link_bytes_per_s: float
    flop_per_s: float
    link_off: float
    compute_off: float

    def flop(self, index: int) -> int:
        """Operations of a block in a pass."""
        return 2 * 2 * ROWS * WIDTH * self.hidden[index] * self.repeats[index]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: seconds of one steady pass.

    Attributes:
        planned_s: under the plan that was made with the wrong rates.
        kept_s: under the plan that the trial kept.
        best_s: under the best of all splits, simulated.
        best_run_s: the same, run by the engine.
        kept_simulated_s: the kept plan, simulated.
        plans: how many plans were run.
    """

    planned_s: float
    kept_s: float
    best_s: float
    best_run_s: float
    kept_simulated_s: float
    plans: int

    @property
    def ratio(self) -> float:
        """The kept plan over the best split."""
        return self.kept_s / self.best_s


def cases(count: int, seed: int, most_blocks: int = 9) -> Iterator[Case]:
    """Random cases; the same seed makes the same ones."""
    draw = random.Random(seed)
    for _ in range(count):
        blocks = draw.randint(3, most_blocks)
        off = [3 ** draw.uniform(-1, 1) for _ in range(2)]
        yield Case(
            hidden=tuple(draw.choice([16, 32, 48, 64, 96, 128]) for _ in range(blocks)),
            repeats=tuple(draw.choice([1, 1, 2, 3, 5]) for _ in range(blocks)),
            share=draw.uniform(0.05, 0.95),
            link_bytes_per_s=1e8,
            # From copies that take four times as long as computing to the other way round.
            flop_per_s=1e9 * 4 ** draw.uniform(-1, 1.5),
            link_off=off[0],
            compute_off=off[1],
        )


def run_case(case: Case, folder: Path, worst: bool = False) -> Outcome:
    """Plan with wrong rates, let the trial run, and hold what it keeps against the best split.

    Args:
        case: what to plan for.
        folder: for packed weights, of which there are none.
        worst: begin with every block streamed through one slot in place of the plan that was made.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)  # products this small are faster on one
    sim = install(
        Config(
            align_bytes=_ALIGN_BYTES,
            h2d_bytes_per_s=case.link_bytes_per_s,
            flop_per_s=case.flop_per_s,
            memory_bytes_per_s=1e30,
        )
    )
    module = Row([Repeated(h, r) for h, r in zip(case.hidden, case.repeats, strict=True)]).eval().requires_grad_(False)
    task = job(module, virtual())
    network = _profiled(task.network, case)
    machine = _wrong(task.machine, case)
    (component,) = network.components
    # With less than a slot for the largest block, blocks would be taken apart.
    smallest_bytes = component.resident_bytes + max(block.slab_bytes for block in component.blocks)
    budget_bytes = int(smallest_bytes + case.share * (task.whole_bytes - smallest_bytes))
    plan = make_plan(network, machine, Workload(), task.limits(budget_bytes))
    if worst:
        largest_bytes = max(block.slab_bytes for block in component.blocks)
        plan = with_split(plan, ((False,) * len(case.hidden), largest_bytes))
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    engine = task.engine(folder, plan).attach(task.modules, None)
    try:
        planned_s = steady_s(sim, module, x)
        contest = Contest(plan, network, machine)
        trial = Trial(engine, contest, lambda lessons: None).begin()
        for _ in range(_MOST_PASSES):
            if trial.is_over:
                break
            module(x)
        kept_s = steady_s(sim, module, x)
        kept = _split(engine.plan)
        best, best_s = best_split(case, engine.plan, budget_bytes)
        engine.rearrange(with_split(engine.plan, best))
        best_run_s = steady_s(sim, module, x)
    finally:
        engine.detach()
    tried = sum(len(bout.runs) for bout in contest._bouts.values())
    return Outcome(planned_s, kept_s, best_s, best_run_s, simulated_s(case, plan, kept), tried)


def steady_s(sim: SimDevice, module: nn.Module, x: torch.Tensor, passes: int = 8) -> float:
    """Seconds of a pass in the rhythm of many, on the simulated clock."""
    ends = []
    for _ in range(passes):
        module(x)
        ends.append(sim.clock.streams[0].time_s)
    return (ends[-1] - ends[-1 - passes // 2]) / (passes // 2)


def simulated_s(case: Case, plan: Plan, split: Split, passes: int = 12) -> float:
    """The same by the planner's simulation, with the true rates."""
    stays, staging_bytes = split
    sizes = [place.stored_bytes for place in plan.placements()]
    numbers: dict[int, int] = {}
    for index, stay in enumerate(stays):
        if not stay:
            numbers[index] = len(numbers)
    steps = [(0, numbers.get(i, -1), case.flop(i) / case.flop_per_s, i) for i in range(len(sizes))]
    if not numbers:
        return sum(step[2] for step in steps)
    machinery = Machinery([Lane([Move(sizes[i] / case.link_bytes_per_s, nbytes=sizes[i]) for i in numbers], staging_bytes)])
    ends = [machinery.run(steps) for _ in range(passes)]
    return (ends[-1] - ends[-1 - passes // 2]) / (passes // 2)


def best_split(case: Case, plan: Plan, budget_bytes: int) -> tuple[Split, float]:
    """The fastest of every choice of residents and staging within a budget, by the true rates."""
    (phase,) = plan.phases
    sizes = [place.stored_bytes for place in phase.placements]
    room_bytes = budget_bytes - phase.fixed_bytes - phase.activation_bytes
    found: list[tuple[float, Split]] = []
    for stays in product((True, False), repeat=len(sizes)):
        streamed = [size for size, stay in zip(sizes, stays, strict=True) if not stay]
        rows = [(streamed + streamed)[first : first + length] for first in range(len(streamed)) for length in range(1, len(streamed) + 1)]
        for staging_bytes in {sum(row) for row in rows} if streamed else (0,):
            if max(streamed, default=0) <= staging_bytes <= room_bytes - sum(sizes) + sum(streamed):
                found.append((simulated_s(case, plan, (stays, staging_bytes)), (stays, staging_bytes)))
    best_s, best = min(found)
    return best, best_s


def _split(plan: Plan) -> Split:
    (phase,) = plan.phases
    return tuple(place.tier.value == "device" for place in phase.placements), phase.staging_bytes


def with_split(plan: Plan, split: Split) -> Plan:
    """The plan with other residents and another staging buffer; what is streamed waits in pinned RAM."""
    from overflowml_core.facts import Tier

    stays, staging_bytes = split
    (phase,) = plan.phases
    tiers = [Tier.DEVICE if stay else Tier.PINNED for stay in stays]
    placements = tuple(replace(place, tier=tier, home=tier) for place, tier in zip(phase.placements, tiers, strict=True))
    slot_bytes = max((place.stored_bytes for place in placements if place.tier is Tier.PINNED), default=0)
    phase = replace(phase, placements=placements, staging_bytes=staging_bytes, slot_bytes=slot_bytes)
    return replace(plan, strategy="stream", phases=(phase,), fingerprint="")


def _profiled(network: Network, case: Case) -> Network:
    """The network with what its blocks compute, as tracing would find it."""
    works = tuple(BlockWork((Work("matmul", "F32", case.flop(i), 0),)) for i in range(len(case.hidden)))
    (component,) = network.components
    component = replace(component, profiles=(PassProfile("denoise", 50, 0, works, source="traced"),), passes=50)
    return replace(network, components=(component,), fingerprint=network_fingerprint((component,)))


def _wrong(machine: Machine, case: Case) -> Machine:
    link = case.link_bytes_per_s * case.link_off
    rates = Rates(link, link, 1e9, "measured", memory_bytes_per_s=1e30)
    return replace(machine, rates=replace(rates, compute=(ComputeRate("matmul", "F32", case.flop_per_s * case.compute_off),)))


def measure(count: int = 50, seed: int = 0) -> dict[str, float]:
    """Run random cases.

    Returns:
        ``max_over_best``: the worst kept plan over its best split; ``max_over_best_from_worst``: the same where the trial began with every
        block streamed through one slot; ``max_planned_over_best``: before the trials;
        ``max_model_error``: the most that simulation and engine differ, of the same split; ``plans``: run in a trial, on average.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [run_case(case, Path(folder)) for case in cases(count, seed)]
        recovered = [run_case(case, Path(folder), worst=True) for case in cases(count // 5, seed + 1)]
    return {
        "cases": float(count),
        "max_over_best": max(one.ratio for one in outcomes),
        "max_over_best_from_worst": max((one.ratio for one in recovered), default=1.0),
        "max_planned_over_best": max(one.planned_s / one.best_s for one in outcomes),
        "max_model_error": max(max(abs(one.best_run_s / one.best_s - 1), abs(one.kept_s / one.kept_simulated_s - 1)) for one in outcomes),
        "plans": sum(one.plans for one in outcomes) / count,
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:24} {value:.4f}")
