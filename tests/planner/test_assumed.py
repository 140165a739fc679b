"""Rates that nobody measured tell users what to expect, and leave no memory unused; of equals the simplest wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from overflowml_core.facts import Workload
from overflowml_core.planner import make_plan
from tests.planner.build import GIB, MIB, granted, network
from tests.planner.build_timed import RATES, on, timed

ASSUMED = replace(RATES, source="assumed")


def _hidden(count: int = 9):
    """Blocks whose copies hide behind what they compute: it takes the same time however many stay."""
    return network(timed("model", [100 * MIB] * count, [1.0] * count, passes=5))


@pytest.mark.parametrize("rates", [RATES, ASSUMED])
def test_what_fits_stays_though_streaming_takes_no_longer(rates):
    plan = make_plan(_hidden(), on(rates), Workload(), granted(8 * GIB))
    assert plan.strategy == "direct"
    (sequential,) = [r for r in plan.rejected if r.strategy == "sequential"]
    assert sequential.viable
    assert sequential.estimate.total_s == pytest.approx(plan.estimate.total_s, rel=0.02)


def test_assumed_rates_leave_no_memory_unused():
    plan = make_plan(_hidden(), on(ASSUMED), Workload(), granted(600 * MIB))
    assert plan.strategy == "stream"
    assert sum(p.tier == "device" for p in plan.placements()) == 4
    assert plan.estimate.total_s is not None


def test_an_odd_number_of_streamed_blocks_does_not_empty_the_device():
    """With two slots it costs a bubble a pass, which streaming every block would save by these rates."""
    short = network(timed("model", [100 * MIB] * 6, [0.001] * 6, passes=50))
    kept = []
    for budget in range(250, 700, 50):
        plan = make_plan(short, on(ASSUMED), Workload(), granted(budget * MIB))
        kept.append(sum(p.tier == "device" for p in plan.placements()))
    assert kept == sorted(kept)
