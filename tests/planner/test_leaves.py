"""Blocks that no budget holds whole are taken apart, as few as it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Block, Component, Limits, Network, Tier, Workload, network_fingerprint
from overflowml_core.network_reader import network_from_json, network_to_json
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan, smallest_budget_bytes, timeline_of
from overflowml_core.planner.leaves import as_placed, finer
from overflowml_core.work import BlockWork, PassProfile, Work
from tests.planner.build import MIB, component, machine, network


def with_leaves(block: Block, sizes: list[int], loose: int = 0) -> Block:
    leaves = tuple(
        replace(block, name=f"{block.name}.part{i}", stored_bytes=s, slab_bytes=s, weight_count=s // 2) for i, s in enumerate(sizes)
    )
    total = sum(sizes) + loose
    return replace(block, stored_bytes=total, slab_bytes=total, weight_count=total // 2, leaves=leaves)


def divisible(parts: list[list[int]], fixed: int = 0, activations: int = 0, loose: int = 0) -> Network:
    plain = component("model", [1] * len(parts), fixed, activations)
    blocks = tuple(with_leaves(block, sizes, loose) for block, sizes in zip(plain.blocks, parts, strict=True))
    whole = sum(block.slab_bytes for block in blocks)
    made = replace(plain, blocks=blocks, bytes_by_dtype=(("BF16", fixed + whole),))
    return network(made)


def plan_of(net: Network, budget: int) -> Plan:
    return make_plan(net, machine(), Workload(), Limits.exactly(device_memory=budget))


def names(plan: Plan) -> list[str]:
    return [place.block for place in plan.placements()]


def test_blocks_that_fit_stay_whole() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 6)
    plan = plan_of(net, 250 * MIB)
    assert names(plan) == [f"layers.{i}" for i in range(6)]
    assert finer(net, Limits(), 250 * MIB) is None


def test_a_block_larger_than_the_budget_is_streamed_by_its_leaves() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 6, fixed=10 * MIB, activations=5 * MIB)
    plan = plan_of(net, 100 * MIB)
    assert names(plan) == [f"layers.{i}.part{j}" for i in range(6) for j in range(2)]
    assert plan.phases[0].slot_bytes == 60 * MIB
    assert plan.phases[0].device_bytes <= 100 * MIB
    assert plan.network_fingerprint == net.fingerprint
    assert any("6 of 6 blocks" in reason and "12 innermost modules" in reason for reason in plan.reasons)


def test_only_the_largest_blocks_are_taken_apart() -> None:
    net = divisible([[40 * MIB, 60 * MIB], [20 * MIB, 20 * MIB], [20 * MIB, 20 * MIB]])
    plan = plan_of(net, 70 * MIB)
    assert names(plan) == ["layers.0.part0", "layers.0.part1", "layers.1", "layers.2"]


def test_weights_outside_the_leaves_stay_on_the_device() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 4, fixed=MIB, loose=2 * MIB)
    plan = plan_of(net, 90 * MIB)
    assert plan.phases[0].fixed_bytes == MIB + 4 * 2 * MIB


def test_what_fits_in_no_way_is_refused_with_the_largest_leaf() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 4, fixed=10 * MIB)
    with pytest.raises(DoesNotFit, match="at least"):
        plan_of(net, 69 * MIB)
    assert plan_of(net, 70 * MIB).phases[0].slot_count == 1
    assert smallest_budget_bytes(net, machine(), Limits()) == 70 * MIB


def test_a_block_that_runs_twice_stays_whole() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 3)
    blocks = net.components[0].blocks
    tied = replace(blocks[2], tied_to="layers.0", stored_bytes=0, slab_bytes=0, weight_count=0)
    net = network(replace(net.components[0], blocks=(blocks[0], blocks[1], tied)))
    with pytest.raises(DoesNotFit):
        plan_of(net, 90 * MIB)


def profiled(net: Network) -> Network:
    work = BlockWork((Work("matmul", "BF16", 10**12, 10**9, 10**9),))
    profile = PassProfile("token", 8, 0, (work,) * len(net.components[0].blocks), source="traced")
    made: Component = replace(net.components[0], profiles=(profile,))
    return Network((made,), net.source, net.class_name, network_fingerprint((made,)))


def test_the_work_of_a_block_is_kept() -> None:
    net = profiled(divisible([[40 * MIB, 60 * MIB]] * 4))
    apart = finer(net, Limits(), 90 * MIB)
    assert apart is not None
    before, after = net.components[0].profiles[0], apart.components[0].profiles[0]
    assert after.flop == before.flop
    assert len(after.blocks) == 8


def test_a_timeline_is_drawn_for_the_leaves() -> None:
    net = profiled(divisible([[40 * MIB, 60 * MIB]] * 4))
    plan = plan_of(net, 90 * MIB)
    drawn = timeline_of(plan, net, machine())
    assert {event.block for event in drawn.events if event.engine == "link"} <= set(names(plan))


def test_leaves_survive_the_profile_cache() -> None:
    net = divisible([[40 * MIB, 60 * MIB]] * 2)
    assert network_from_json(network_to_json(net)) == net


@settings(max_examples=150)
@given(
    parts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=5),
    fixed=st.integers(0, 20),
    loose=st.integers(0, 3),
    budget=st.integers(1, 200),
)
def test_a_plan_is_found_from_the_smallest_budget_on(parts: list[list[int]], fixed: int, loose: int, budget: int) -> None:
    net = divisible([[size * 512 for size in sizes] for sizes in parts], fixed * 512, loose=loose * 512)
    least = smallest_budget_bytes(net, machine(), Limits())
    if budget * 512 < least:
        with pytest.raises(DoesNotFit):
            plan_of(net, budget * 512)
        return
    plan = plan_of(net, budget * 512)
    assert plan.phases[0].device_bytes <= budget * 512
    placed = as_placed(net, plan)
    assert [block.name for block in placed.components[0].blocks] == names(plan)
    held = plan.phases[0].fixed_bytes + sum(place.stored_bytes for place in plan.placements())
    assert held == net.components[0].slab_bytes
    assert all(place.tier in (Tier.DEVICE, Tier.PINNED, Tier.DISK) for place in plan.placements())
