"""A model over several machines: stages that hold their layers, against trying every partition, and in words."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit, OverflowmlError
from overflowml_core.machine import Accelerator, Kind, Machine, Rates
from overflowml_core.planner.serving import UTILIZATION, Serving, _shared_out, fits_one, plan_serving
from overflowml_core.work import BlockWork, PassProfile, Work
from tests.planner.build import GIB, MIB, component, machine, network

MEMORY_BYTES_PER_S, LINK_BYTES_PER_S = 1e12, 2e10
RATES = Rates(LINK_BYTES_PER_S, LINK_BYTES_PER_S, 1e9, memory_bytes_per_s=MEMORY_BYTES_PER_S)


def box(name: str, count: int, gpu_gib: int, gpus: int = 1, ram_gib: int = 64) -> Kind:
    plain: Machine = machine(gpu_gib * GIB, ram_gib * GIB)
    cards = tuple(Accelerator("cuda", "Test GPU", index, gpu_gib * GIB, gpu_gib * GIB) for index in range(gpus))
    return Kind(name, count, replace(plain, accelerators=cards, rates=RATES))


def model(layers: int = 32, layer_gib: float = 1.0, ends_gib: float = 0.5, cache_bytes: int = 0):
    size = int(layer_gib * GIB)
    work = BlockWork((Work("memory", "BF16", 0, size, size),))
    token = PassProfile("token", 1, cache_bytes + 64 * MIB, (work,) * layers, (), cache_bytes)
    return network(replace(component("model", [size] * layers, int(ends_gib * GIB)), profiles=(token,)))


def check(way: Serving, layers: int, layer_bytes: int) -> None:
    """Every layer is somewhere, no GPU is over its share, and a machine's GPUs are its own."""
    assert sum(stage.layers for stage in way.stages) == layers
    assert all(stage.layers > 0 for stage in way.stages)
    assert {len(stage.gpus) for stage in way.stages} == {way.tensor_parallel}
    for stage in way.stages:
        held = -(-stage.layers * layer_bytes // way.tensor_parallel)
        assert stage.gpu_bytes + stage.offloaded_bytes >= held
    places = [(stage.machine, gpu) for stage in way.stages for gpu in stage.gpus]
    assert len(set(places)) == len(places)
    assert len({stage.machine for stage in way.stages}) == way.machine_count


def test_the_fewest_machines_hold_it() -> None:
    way = plan_serving(model(), [box("desk", 5, 24)])
    assert way.machines == (("desk", 2),)
    assert [stage.layers for stage in way.stages] == [16, 16]
    check(way, 32, GIB)
    assert all(stage.gpu_bytes <= 24 * GIB * UTILIZATION for stage in way.stages)
    # Both stages read their layers one after the other, and a token is handed over once.
    assert way.token_s == pytest.approx(32 * GIB / MEMORY_BYTES_PER_S + 100e-6)


def test_gpus_of_one_machine_share_layers_where_heads_divide() -> None:
    four = box("server", 1, 12, gpus=4)
    way = plan_serving(model(), [four], heads=32)
    assert (way.tensor_parallel, way.pipeline_parallel) == (4, 1)
    assert way.token_s == pytest.approx(32 * GIB / 4 / MEMORY_BYTES_PER_S + 2 * 32 * 20e-6)
    way = plan_serving(model(), [four], heads=30)
    assert (way.tensor_parallel, way.pipeline_parallel) == (2, 2)
    three = plan_serving(model(), [box("server", 1, 24, gpus=3)])
    assert (three.tensor_parallel, three.pipeline_parallel) == (1, 3)  # nobody knows whether three divide its heads
    assert plan_serving(model(), [box("server", 1, 24, gpus=3)], heads=24).tensor_parallel == 3


def test_unlike_machines_get_layers_by_their_memory() -> None:
    way = plan_serving(model(), [box("small", 1, 12), box("large", 1, 32)])
    assert way.machines == (("large", 1), ("small", 1))
    large, small = way.stages
    assert large.layers > 2 * small.layers
    check(way, 32, GIB)
    assert fits_one(model(), [box("small", 1, 12), box("large", 2, 32)])[0] == ("small", None)
    alone = dict(fits_one(model(), [box("small", 9, 12), box("large", 2, 32)]))
    assert {name: found.machine_count for name, found in alone.items() if found is not None} == {"small": 4, "large": 2}


def test_what_fits_nowhere_waits_in_ram_and_is_paid_for_with_every_token() -> None:
    way = plan_serving(model(), [box("desk", 1, 24)])
    assert way.offload_gib == 11
    check(way, 32, GIB)
    assert way.stages[0].gpu_bytes <= 24 * GIB * UTILIZATION
    assert way.token_s == pytest.approx(32 * GIB / MEMORY_BYTES_PER_S + 11 * GIB / LINK_BYTES_PER_S)
    # A second machine takes what would have waited.
    assert plan_serving(model(), [box("desk", 2, 24)]).offload_gib == 0
    with pytest.raises(DoesNotFit, match=r"32\.50 GiB of weights do not fit on all 1 machines"):
        plan_serving(model(), [box("desk", 1, 24, ram_gib=8)])


def test_keys_and_values_take_room() -> None:
    assert plan_serving(model(), [box("desk", 9, 24)]).machine_count == 2
    assert plan_serving(model(cache_bytes=16 * GIB), [box("desk", 9, 24)]).machine_count == 3


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(OverflowmlError, match="no machine has a GPU"):
        plan_serving(model(), [Kind("laptop", 1, machine(None))])
    picture = network(component("transformer", [GIB] * 4), component("vae", [GIB] * 2))
    with pytest.raises(OverflowmlError, match="2 components"):
        plan_serving(picture, [box("desk", 1, 24)])


def test_without_rates_there_is_no_time() -> None:
    kind = box("desk", 2, 24)
    unknown = replace(kind, machine=replace(kind.machine, rates=replace(RATES, memory_bytes_per_s=0.0)))
    assert plan_serving(model(), [unknown]).token_s is None


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(sizes, st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_layers_are_shared_out_as_well_as_in_any_partition(layers: list[int], rooms: list[int]) -> None:
    found = _shared_out(layers, rooms)
    best = None
    for cuts in combinations(range(1, len(layers)), len(rooms) - 1):
        loads = [sum(layers[a:b]) for a, b in pairwise((0, *cuts, len(layers)))]
        if all(load <= room for load, room in zip(loads, rooms, strict=True)):
            fullest = max(load / room for load, room in zip(loads, rooms, strict=True))
            best = fullest if best is None else min(best, fullest)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        bounds = [0]
        for count in found:
            bounds.append(bounds[-1] + count)
        assert bounds[-1] == len(layers)
        assert all(count > 0 for count in found)
        assert max(sum(layers[a:b]) / room for (a, b), room in zip(pairwise(bounds), rooms, strict=True)) == pytest.approx(best, rel=1e-6)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_whatever_is_planned_is_whole(layers: int, gpus: int, count: int, others: int) -> None:
    kinds = [box("one", count, 8, gpus), box("two", others, 24)]
    try:
        way = plan_serving(model(layers), kinds)
    except DoesNotFit:
        return
    check(way, layers, GIB)
    for stage in way.stages:
        size = 8 if stage.kind == "one" else 24
        assert stage.gpu_bytes <= size * GIB * UTILIZATION
