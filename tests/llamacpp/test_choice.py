"""What is taken fits, and nothing that fits is better: everything, else as few experts away as must be, else as many layers as fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_llamacpp.choice import ALL, CPU, EXPERTS, LAYERS, PART, choose
from overflowml_llamacpp.memory import CACHE_TYPES, Placement, memory_of
from overflowml_llamacpp.model import Layer, LlamaModel
from overflowml_llamacpp.pace import CPU_SHARE, disk_share, token_seconds

F16 = CACHE_TYPES["f16"]
TOKENS = 1024


def needs(model, gpu_layers, cpu_moe=0, cache=F16):
    return memory_of(model, Placement(gpu_layers, cpu_moe, (), cache), TOKENS).device_bytes


def test_all_of_it_where_that_fits(made, read, card):
    model = read(made.qwen3moe())
    way = choose(model, card(needs(model, 6)), TOKENS, ("f16",)).way
    assert (way.kind, way.placement.gpu_layers, way.placement.cpu_moe, way.memory.host_read_bytes) == (ALL, 6, 0, 0)


@pytest.mark.parametrize("cpu_moe", [1, 3, 5])
def test_the_fewest_experts_that_fit_stay_on_the_cpu(made, read, card, cpu_moe):
    model = read(made.qwen3moe())
    choice = choose(model, card(needs(model, 6, cpu_moe)), TOKENS, ("f16",))
    assert (choice.way.kind, choice.way.placement.cpu_moe) == (EXPERTS, cpu_moe)
    assert needs(model, 6, cpu_moe - 1) > needs(model, 6, cpu_moe)
    assert choice.whole_layers.kind == LAYERS


def test_room_that_is_left_holds_a_part_of_a_layers_experts(made, read, card):
    model = read(made.qwen3moe(count=64))
    product = model.layers[0].experts[0][1]
    way = choose(model, card(needs(model, 6, 3) + product), TOKENS, ("f16",)).way
    assert (way.kind, way.placement.cpu_moe, len(way.placement.cpu_tensors)) == (PART, 2, 2)
    assert all(name.startswith("blk.2.ffn_") for name in way.placement.cpu_tensors)
    assert way.memory.device_bytes <= needs(model, 6, 3) + product


def test_a_dense_model_gets_as_many_layers_as_fit(made, read, card):
    model = read(made.llama())
    way = choose(model, card(needs(model, 4)), TOKENS, ("f16",)).way
    assert (way.kind, way.placement.gpu_layers) == (LAYERS, 4)
    assert needs(model, 5) > needs(model, 4)


def test_layers_without_experts_are_not_counted_twice(made, read, card):
    model = read(made.deepseek2())  # the first layer is dense
    way = choose(model, card(needs(model, 5, 2)), TOKENS, ("f16",)).way
    assert way.placement.cpu_moe == 2
    assert needs(model, 5, 1) == needs(model, 5, 0)


def test_experts_leave_before_layers_do(made, read, card):
    model = read(made.qwen3moe())
    way = choose(model, card(needs(model, 3, 5)), TOKENS, ("f16",)).way
    assert (way.kind, way.placement.gpu_layers) == (EXPERTS, 3)
    assert way.placement.cpu_moe == 5


def test_a_budget_below_what_is_no_layer_leaves_the_cpu(made, read, card):
    model = read(made.qwen3moe())
    choice = choose(model, card(needs(model, 1) - 1), TOKENS, ("f16",))
    assert (choice.way.kind, choice.way.placement.gpu_layers) == (CPU, 0)
    assert {no.kind: no.needed_bytes for no in choice.refused}[LAYERS] == needs(model, 1)


def test_without_a_device_there_is_one_way(made, read, card):
    choice = choose(read(made.llama()), replace(card(0), device_rates=None), TOKENS, ("f16",))
    assert [way.kind for way in choice.ways if way.placement.cache == F16] == [CPU]


def test_fewer_bits_of_the_cache_are_taken_when_asked_and_worth_it(made, read, card):
    model = read(made.llama())
    q8 = CACHE_TYPES["q8_0"]
    budget = memory_of(model, Placement(7, 0, (), q8), 32768).device_bytes
    precise = choose(model, card(budget), 32768, ("f16",))
    assert precise.way.placement.cache == F16
    assert any(way.placement.cache == q8 and way.cost < precise.way.cost for way in precise.ways)  # shown, not taken
    assert choose(model, card(budget), 32768, ("f16", "q8_0")).way.placement.cache == q8
    assert choose(model, card(needs(model, 7)), 256, ("f16", "q8_0")).way.placement.cache == F16  # nothing is gained


def test_heads_that_groups_do_not_divide_keep_f16(made, read, card):
    metadata, tensors = made.llama()
    odd = metadata | {"llama.attention.key_length": 48, "llama.attention.value_length": 48}
    choice = choose(read((odd, tensors)), card(10**9), TOKENS, ("f16", "q8_0"))
    assert choice.way.placement.cache == F16
    assert "q8_0 is left out" in choice.warnings[0]


def test_rates_that_are_not_known_leave_the_order_by_bytes(made, read, card):
    model = read(made.qwen3moe())
    choice = choose(model, replace(card(needs(model, 6, 2)), device_rates=None), TOKENS, ("f16",))
    assert (choice.way.kind, choice.way.token_s) == (EXPERTS, None)


def test_a_token_takes_what_it_reads_over_the_rates(made, read, card):
    model = read(made.qwen3moe())
    setting = card(needs(model, 6, 2))
    memory = memory_of(model, Placement(6, 2, (), F16), TOKENS)
    device, host = setting.device_rates.memory_bytes_per_s, setting.cpu_rates.memory_bytes_per_s
    expected = memory.device_read_bytes / device + memory.host_read_bytes / (CPU_SHARE * host)
    assert token_seconds(memory, setting) == pytest.approx(expected)


def test_weights_that_ram_does_not_hold_come_from_the_disk(made, read, card):
    model = read(made.qwen3moe())
    memory = memory_of(model, Placement(6, 5, (), F16), TOKENS)
    small = card(10**9, host_bytes=memory.host_weight_bytes // 2)
    assert disk_share(memory, small) == pytest.approx(0.5, abs=0.001)
    more = token_seconds(memory, small) - token_seconds(memory, card(10**9))
    assert more == pytest.approx(memory.host_read_bytes / 2 / small.cpu_rates.disk_bytes_per_s, rel=0.01)


def moe_model(layers):
    made = tuple(
        Layer(dense, dense, ((f"blk.{i}.ffn_up_exps", bank), (f"blk.{i}.ffn_down_exps", bank)), bank // 4, dense)
        for i, (dense, bank) in enumerate(layers)
    )
    return LlamaModel((), "a", "", made, 10**6, 10**6, 0, 64, 128, 320, 256, 2048, (8, 1))


shapes = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**8)), min_size=1, max_size=5)


@given(shapes, st.integers(1, 10**9), st.integers(0, 10**8))
def test_never_over_budget_and_more_of_it_is_never_slower(card_setting, layers, budget, more):
    model = moe_model(layers)
    small, large = (choose(model, replace(card_setting, device_bytes=n), TOKENS, ("f16",)) for n in (budget, budget + more))
    for choice, limit in ((small, budget), (large, budget + more)):
        assert all(way.memory.device_bytes <= limit for way in choice.ways)
        assert choice.way.cost <= min(way.cost for way in choice.ways if way.placement.cache == F16) * 1.011
    assert large.way.cost <= small.way.cost * 1.011  # a simpler way may be taken that is a hundredth slower


@pytest.fixture(scope="session")
def card_setting():
    from overflowml_core.inspect.named import named_machine
    from overflowml_llamacpp.setting import setting_of

    return setting_of(named_machine("RTX 4090", ram_bytes=64 * 2**30), 10**9)
