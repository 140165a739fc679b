"""Golden cases: a network, a machine and limits, and what must come out. Sizes in the files are MiB."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from tests.planner.build import MIB, block, component, machine, network

CASES = sorted((Path(__file__).parent / "cases").glob("*.json"))


def _arguments(case: dict):
    parts = []
    for part in case["network"]:
        sizes = [size * MIB for count, size in part["blocks"] for _ in range(count)]
        parts.append(component(part["name"], sizes, part["fixed"] * MIB, part["activations"] * MIB, passes=part.get("passes", 1)))
    sizes = {name: None if size is None else size * MIB for name, size in case["machine"].items()}
    return network(*parts), machine(**sizes), Workload(), Limits(**case["limits"])


def _found(plan: Plan) -> dict:
    return {
        "strategy": plan.strategy,
        "device": plan.device,
        "resident": {p.name: len(p.placements) - len(p.streamed) for p in plan.phases},
        "streamed": {p.name: len(p.streamed) for p in plan.phases},
        "slots": {p.name: p.slot_count for p in plan.phases},
        "slot_mib": {p.name: p.slot_bytes // MIB for p in plan.phases if p.slot_count},
        "homes": dict(Counter(placement.home.value for placement in plan.placements())),
        "pinned_mib": plan.estimate.pinned_bytes // MIB,
        "rejected": {r.strategy: r.reason for r in plan.rejected},
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path):
    case = json.loads(path.read_text(encoding="utf-8"))
    expect = case["expect"]
    if "does_not_fit" in expect:
        with pytest.raises(DoesNotFit) as caught:
            make_plan(*_arguments(case))
        assert str(caught.value) == expect["does_not_fit"]
        assert [miss.strategy for miss in caught.value.near_misses] == expect["near_misses"]
        return
    found = _found(make_plan(*_arguments(case)))
    for name, value in expect.items():
        if name == "rejected":
            assert {key: found[name][key] for key in value} == value
        else:
            assert found[name] == value, name


def test_tied_block_takes_no_bytes_and_its_owners_place():
    blocks = tuple(block(f"layers.{i}", 100 * MIB, tied_to="layers.1" if i == 4 else None) for i in range(6))
    made = replace(component("model", [100 * MIB] * 5), blocks=blocks)
    for budget in range(100, 500, 50):
        plan = make_plan(network(made), machine(), Workload(), Limits(device_memory=f"{budget}MiB"))
        placed = {p.block: p for p in plan.placements()}
        assert placed["layers.4"].stored_bytes == 0
        assert (placed["layers.4"].tier, placed["layers.4"].home) == (placed["layers.1"].tier, placed["layers.1"].home)


def test_network_without_blocks_or_components():
    assert make_plan(network(), machine(), Workload(), Limits()).strategy == "direct"
    vae = network(component("vae", [], 300 * MIB))
    assert make_plan(vae, machine(), Workload(), Limits()).strategy == "direct"
    with pytest.raises(DoesNotFit, match=r"^vae: needs at least 315MB on cuda:0 and the budget is 200MB: 115MB short"):
        make_plan(vae, machine(), Workload(), Limits(device_memory="200MB"))


def test_phase_with_most_passes_gets_pinned_memory_first():
    encoder, denoiser = component("encoder", [400 * MIB] * 10), component("denoiser", [400 * MIB] * 10, passes=28)
    plan = make_plan(network(encoder, denoiser), machine(2048 * MIB, pinnable=2000 * MIB), Workload(), Limits())
    assert {p.tier for p in plan.phase_of("denoiser").streamed} == {Tier.PINNED, Tier.RAM}
    assert {p.tier for p in plan.phase_of("encoder").streamed} == {Tier.RAM}
