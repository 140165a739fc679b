"""The planner's simulation against the real streamer on the virtual accelerator: the same passes end at the same times."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from overflowml_core.facts import Limits, Tier, Workload  # noqa: E402 -- only where there is torch
from overflowml_core.planner import make_plan  # noqa: E402
from overflowml_core.planner.machinery import Lane, Machinery, Move  # noqa: E402
from tests.runtime.build import Block, job, settled, stack  # noqa: E402
from tests.runtime.conftest import vgpu  # noqa: E402, F401 -- a fixture

WIDTH, ROWS = 32, 16
FLOP_PER_S, H2D_BYTES_PER_S = 1e8, 1e8


def _engine(vgpu, hidden, flags, share):  # noqa: F811
    """A stack of unequal blocks with these residents, and the plan behind it; ``share`` says how large its staging buffer is: 0 for the
    largest block, 1 for all of them."""
    module = stack(len(hidden), WIDTH)
    for i, size in enumerate(hidden):
        module.blocks[i] = Block(WIDTH, size).eval().requires_grad_(False)
    made = job(module, vgpu.device, budget_bytes=2**30)
    plan = make_plan(made.network, made.machine, Workload(), Limits.exactly(device_memory=2**30, reserve=0))
    (phase,) = plan.phases
    placements = tuple(
        replace(p, tier=Tier.DEVICE if stays else Tier.PINNED, home=Tier.DEVICE if stays else Tier.PINNED)
        for p, stays in zip(phase.placements, flags, strict=True)
    )
    streamed = [p.stored_bytes for p in placements if p.tier is Tier.PINNED]
    slot_bytes = max(streamed)
    staging_bytes = slot_bytes + int(share * (sum(streamed) - slot_bytes))
    phase = replace(phase, placements=placements, staging_bytes=staging_bytes, slot_bytes=slot_bytes)
    return module, made, replace(plan, strategy="stream", phases=(phase,), fingerprint="")


def _measured(vgpu, module, orders) -> list[float]:  # noqa: F811
    x = torch.zeros(ROWS, WIDTH, device="vgpu")
    ends = []
    for order in orders:
        module.order = order
        module(x)
        ends.append(vgpu.sim.clock.streams[0].time_s)
    return ends


def _simulated(hidden, placements, staging_bytes, orders) -> list[float]:
    numbers, moves = {}, []
    for i, place in enumerate(placements):
        if place.tier is not Tier.DEVICE:
            numbers[i] = len(moves)
            moves.append(Move(place.stored_bytes / H2D_BYTES_PER_S, nbytes=place.stored_bytes))
    seconds = [2 * 2 * ROWS * WIDTH * size / FLOP_PER_S for size in hidden]
    machinery = Machinery([Lane(moves, staging_bytes)])
    return [machinery.run([(0, numbers.get(i, -1), seconds[i], i) for i in order]) for order in orders]


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_ends_when_the_simulation_says(seed, tmp_path, vgpu):  # noqa: F811
    draw = random.Random(seed)
    count = draw.randint(2, 9)
    hidden = [draw.choice([16, 32, 64, 128]) for _ in range(count)]
    flags = [draw.random() < 0.4 for _ in range(count)]
    flags[draw.randrange(count)] = False
    share = draw.choice([0.0, 1.0, draw.random(), draw.random()])
    rows = list(range(count))
    # From the second pass on, some call their blocks in another order, leave some out or call one twice.
    other = draw.sample(rows, draw.randint(1, count)) if seed % 3 == 1 else [*rows, draw.choice(rows)] if seed % 3 == 2 else rows
    orders = [rows, rows, *[other] * 4, rows]
    vgpu.reset(h2d_bytes_per_s=H2D_BYTES_PER_S, flop_per_s=FLOP_PER_S, memory_bytes_per_s=1e30)
    module, made, plan = _engine(vgpu, hidden, flags, share)
    engine = made.engine(tmp_path, plan).attach(made.modules, None)
    began = vgpu.sim.clock.streams[0].time_s
    found = _measured(vgpu, module, orders)
    settled(engine)
    engine.detach()
    expected = _simulated(hidden, plan.phases[0].placements, plan.phases[0].staging_bytes, orders)
    assert [end - began for end in found] == pytest.approx(expected)
