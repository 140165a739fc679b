"""Weights and caches are what llama.cpp itself reports, and whatever is moved is neither lost nor counted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import BadLimits
from overflowml_core.inspect.gguf_caches import LayerCache
from overflowml_llamacpp.memory import CACHE_TYPES, Placement, cache_bytes, cells, compute_bytes, memory_of, padded_tokens
from overflowml_llamacpp.model import Layer, LlamaModel, read_model

F16, Q8 = CACHE_TYPES["f16"], CACHE_TYPES["q8_0"]
REPORTED = [
    ("gemma3", 9.19, 7.75, 4.12, 12.03),
    ("gpt_oss", 11.73, 8.62, 4.58, 9.28),
    ("deepseek2", 12.79, 22.50, 11.95, 17.52),
    ("mamba", 3.59, 0.15, 0.15, 7.55),
    ("qwen3moe", 10.99, 12.50, 6.64, 9.52),
    ("lfm2", 4.92, 5.00, 2.66, 10.52),
]
"""What llama.cpp (build 11549, CPU) logged for these very files at ``-c 5000 -np 1`` with a window-sized cache, in MiB: model buffer, KV
and RS buffers with f16 and with q8_0, compute buffer with f16."""


@pytest.mark.parametrize(("name", "weights", "f16", "q8_0", "compute"), REPORTED)
def test_bytes_are_what_llama_cpp_reports(made, read, name, weights, f16, q8_0, compute):
    model, tokens = read(getattr(made, name)()), padded_tokens(5000)
    assert model.weight_bytes / 2**20 == pytest.approx(weights, abs=0.005001)
    for kind, reported in ((F16, f16), (Q8, q8_0)):
        ours = sum(cache_bytes(layer.cache, kind, tokens) for layer in model.layers)
        assert ours / 2**20 == pytest.approx(reported, abs=0.006)
    assert 0.95 * compute < compute_bytes(model, tokens, 0) / 2**20 < 1.15 * compute


def test_smollm2_is_what_llama_cpp_reports():
    from overflowml_core.cli.demo.smollm2 import gguf_folder

    model = read_model(next(gguf_folder().glob("*.gguf")))
    assert sum(cache_bytes(layer.cache, F16, 8192) for layer in model.layers) == 180 * 2**20
    assert sum(cache_bytes(layer.cache, Q8, padded_tokens(8000)) for layer in model.layers) / 2**20 == pytest.approx(95.62, abs=0.006)
    assert model.tied_bytes == model.input_bytes


@pytest.mark.parametrize(("asked", "padded"), [(1, 256), (256, 256), (257, 512), (16384, 16384)])
def test_a_context_is_padded_as_llama_cpp_does(asked, padded):
    assert padded_tokens(asked) == padded


@pytest.mark.parametrize("asked", [0, -1, 2**31])
def test_a_context_of_no_tokens_is_refused(asked):
    with pytest.raises(BadLimits, match=f"--ctx={asked}"):
        padded_tokens(asked)


def test_a_window_has_room_for_itself_and_a_batch():
    assert cells(LayerCache(window=1024), 16384) == 1536
    assert cells(LayerCache(window=1000), 16384) == 1536
    assert cells(LayerCache(window=1024), 1280) == 1280
    assert cells(LayerCache(), 16384) == 16384


def test_block_sizes_of_the_caches_types():
    assert [CACHE_TYPES[name].nbytes(1024) for name in ("f16", "q8_0", "q4_0")] == [2048, 1088, 576]


sizes = st.integers(0, 10**6)
layers = st.builds(
    lambda dense, up, down: Layer(dense, dense, (("blk.0.ffn_up_exps", up), ("blk.0.ffn_down_exps", down)), (up + down) // 4, dense),
    sizes,
    sizes,
    sizes,
)
models = st.builds(
    lambda found, inputs, outputs: LlamaModel((), "a", "", tuple(found), inputs, outputs, 0, 64, 128, 320, 256, 2048, (4, 1)),
    st.lists(layers, min_size=1, max_size=6),
    sizes,
    sizes,
)


@given(models, st.integers(0, 8), st.integers(0, 7))
def test_every_byte_is_in_one_place(model, gpu_layers, cpu_moe):
    memory = memory_of(model, Placement(gpu_layers, cpu_moe, (), F16), 512)
    assert memory.device_weight_bytes + memory.host_weight_bytes == model.weight_bytes
    read = model.output_bytes + sum(layer.dense_read_bytes + layer.expert_read_bytes for layer in model.layers)
    rounding = 2 * len(model.layers)  # a token's share of a product is a whole number of bytes
    assert read - rounding <= memory.device_read_bytes + memory.host_read_bytes <= read


@given(models, st.integers(0, 7), st.integers(0, 6))
def test_more_layers_take_more_of_the_device(model, gpu_layers, cpu_moe):
    less, more = (memory_of(model, Placement(n, cpu_moe, (), F16), 512) for n in (gpu_layers, gpu_layers + 1))
    assert less.device_weight_bytes <= more.device_weight_bytes
    assert less.host_read_bytes >= more.host_read_bytes


def test_a_tied_output_is_held_twice_once_it_is_on_the_device(made, read):
    model = read(made.gemma3())
    embedding = 320 * 256 * 2
    on_cpu, on_device = (memory_of(model, Placement(n, 0, (), F16), 512) for n in (0, 1))
    assert on_cpu.host_weight_bytes == model.weight_bytes == on_device.host_weight_bytes + 256 * 4
    assert on_device.device_weight_bytes == embedding + 256 * 4


def test_the_first_layer_on_the_device_is_the_output(made, read):
    model = read(made.llama())
    one, two = (memory_of(model, Placement(n, 0, (), F16), 512) for n in (1, 2))
    assert (one.device_cache_bytes, one.device_weight_bytes) == (0, model.output_bytes)
    assert two.device_weight_bytes - one.device_weight_bytes == model.layers[-1].dense_bytes
