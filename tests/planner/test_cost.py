"""Seconds of works, and bytes of blocks in a format."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.facts import Block, ComputeRate, Experts, Rates, Work
from overflowml_core.layout import align
from overflowml_core.planner.conversion import weigh
from overflowml_core.planner.cost import AS_IT_IS, Conversion, Costs, Spent
from tests.planner.build_timed import FP8, INT4, INT8

RATES = Rates(
    1e9,
    1e9,
    1e9,
    memory_bytes_per_s=100.0,
    compute=(ComputeRate("matmul", "BF16", 1000.0), ComputeRate("conv", "BF16", 10.0)),
    launch_s=0.5,
)


def _seconds(work: Work, conversion: Conversion = AS_IT_IS, rates: Rates = RATES) -> Spent | None:
    return Costs(rates).seconds((work,), conversion)


@pytest.mark.parametrize(
    ("work", "total_s", "memory_s"),
    [
        (Work("matmul", "BF16", 4000, 200), 4.5, 0.0),
        (Work("matmul", "BF16", 1000, 200), 2.5, 2.0),
        (Work("matmul", "BF16", 1000, 200, calls=4), 4.0, 2.0),
        (Work("conv", "BF16", 100, 200), 10.5, 0.0),
        (Work("attention", "BF16", 4000, 200), 4.5, 0.0),
        (Work("memory", "F32", 10**9, 300), 3.5, 3.0),
        (Work("memory", "F32", 0, 0, calls=2), 1.0, 0.0),
    ],
)
def test_an_operation_takes_the_longer_of_arithmetic_and_memory_and_its_launches(work, total_s, memory_s):
    assert _seconds(work) == Spent(total_s, memory_s)


def test_what_needs_an_unknown_rate_takes_nobody_knows_how_long():
    assert _seconds(Work("matmul", "F32", 1, 1)) is None
    assert _seconds(Work("memory", "F32", 1, 1), rates=replace(RATES, memory_bytes_per_s=0.0)) is None
    assert Costs(RATES).seconds((Work("memory", "F32", 0, 1), Work("matmul", "F32", 1, 1))) is None
    assert Costs(RATES).seconds(()) == Spent(0.0, 0.0)


def test_a_measured_operation_takes_what_was_measured():
    rates = replace(RATES, op_seconds=(("mm 2x2", 3.0),))
    known = Work("matmul", "BF16", 4000, 200, calls=2, signature="mm 2x2")
    assert _seconds(known, rates=rates).total_s == 6.0
    assert _seconds(replace(known, signature="mm 4x4"), rates=rates).total_s == 5.0
    assert _seconds(replace(known, dtype="F64"), rates=rates).total_s == 6.0


def test_a_format_lightens_the_weights_of_products_alone():
    product = Work("matmul", "BF16", 100, 200, weight_bytes=160)
    assert _seconds(product, Conversion(0.25)).total_s == pytest.approx(0.5 + (40 + 40) / 100)
    assert _seconds(replace(product, kind="memory"), Conversion(0.25)).total_s == _seconds(replace(product, kind="memory")).total_s
    assert _seconds(replace(product, flop=4000), Conversion(0.25)).total_s == 4.5


def test_decoding_is_added_where_the_kernel_does_not_do_it():
    product = Work("matmul", "BF16", 4000, 200, weight_bytes=160)
    assert _seconds(product, Conversion(0.25, 80.0)).total_s == 4.5 + 2.0


def test_a_measured_product_gains_what_its_roofline_gains():
    rates = replace(RATES, op_seconds=(("mm", 9.0),), launch_s=0.0)
    product = Work("matmul", "BF16", 0, 200, weight_bytes=100, signature="mm")
    assert _seconds(product, Conversion(0.5), rates).total_s == pytest.approx(9.0 * 150 / 200)
    assert _seconds(replace(product, dtype="F64", flop=1), Conversion(0.5), rates).total_s == 9.0


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.floats(0.1, 1),
)
def test_a_kernel_that_decodes_on_the_way_is_never_slower(flop, traffic, weights, shrink):
    product = Work("matmul", "BF16", flop, traffic, weight_bytes=weights)
    assert _seconds(product, Conversion(shrink)).total_s <= _seconds(product).total_s + 1e-9


def _block(**changes) -> Block:
    made = Block("b", 1000, 2000, align(2000), (("BF16", 2000),), linear_count=800)
    return replace(made, **changes)


def test_linear_weights_shrink_and_the_rest_stays():
    weight = weigh(_block(), INT8)
    assert (weight.format, weight.slab_bytes) == ("int8", align(2048 - 1600 + 800))
    assert weight.conversion == Conversion(0.5, INT8.decode_bytes_per_s)
    assert weigh(_block(), INT4).slab_bytes == align(2048 - 1600 + 400)


@pytest.mark.parametrize(
    "block",
    [
        _block(keep_format=True),
        _block(linear_count=0),
        _block(bytes_by_dtype=(("I8", 2000),)),
        _block(bytes_by_dtype=(("U8", 2000),)),
        _block(bytes_by_dtype=(("F8_E4M3", 2000),), weight_count=2000),
        _block(linear_count=10),
    ],
    ids=["kept", "no linear", "int8", "packed", "fp8", "too few"],
)
def test_what_a_format_cannot_make_smaller_stays_as_stored(block):
    weight = weigh(block, FP8)
    assert (weight.format, weight.slab_bytes, weight.conversion) == ("", block.slab_bytes, AS_IT_IS)


def test_experts_shrink_where_linear_weights_contain_them():
    bank = Experts(4, 2**20, 1)
    size = 5 * 2**20
    block = Block("b", size // 2, size, size, (("BF16", size),), linear_count=size // 2, experts=bank)
    assert weigh(block, None).expert_bytes == 2**20
    assert weigh(block, FP8).expert_bytes == 2**19
    assert weigh(replace(block, linear_count=2**19), FP8).expert_bytes == 2**20


@given(st.integers(1, 10**9), st.floats(0, 1), st.sampled_from([FP8, INT8, INT4]))
def test_a_block_is_never_larger_in_a_format(count, share, form):
    block = Block("b", count, 2 * count, align(2 * count), (("BF16", 2 * count),), linear_count=int(count * share))
    weight = weigh(block, form)
    assert 0 <= weight.slab_bytes <= block.slab_bytes
    assert weight.slab_bytes == align(weight.slab_bytes)
    assert bool(weight.format) == (weight.slab_bytes < block.slab_bytes)


def test_equal_works_are_reckoned_once_whoever_holds_them():
    costs = Costs(RATES)
    one, other = ((Work("matmul", "BF16", 1, 1),) for _ in range(2))
    assert costs.seconds(one) is costs.seconds(other)
