"""Arithmetic agrees with hand counts and with what was traced of the real models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from overflowml_core.analytic import Attention, LanguageShape, Layer, Routed, language_model_profiles, language_shape
from overflowml_core.analytic_images import (
    DiffusionLayer,
    DiffusionShape,
    decoder_profile,
    decoder_shape,
    diffusion_profiles,
    diffusion_shape,
    image_tokens,
)
from overflowml_core.facts import Block, Experts, Workload

LLAMA_70B = SimpleNamespace(
    hidden_size=8192,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=128256,
)
LLAMA_70B_LAYER = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28672


def blocks(count, weights, **more):
    return [Block(f"layers.{i}", weights, 2 * weights, 2 * weights, linear_count=weights, **more) for i in range(count)]


def flop(profile, *kinds):
    works = [work for block in profile.blocks for work in block.works] + list(profile.outside)
    return sum(work.flop for work in works if work.kind in kinds)


def llama_70b(workload):
    shape = language_shape(LLAMA_70B, blocks(80, LLAMA_70B_LAYER), 2, generates=True)
    return language_model_profiles(shape, workload)


def test_llama_70b_prefill():
    prefill, token = llama_70b(Workload(prompt_tokens=2048, new_tokens=64))
    logits = 2 * 128256 * 8192
    # Counted with logits at all 2048 positions: 284.7 TFLOP; generating needs them at the last one alone.
    assert flop(prefill, "matmul") + 2047 * logits == pytest.approx(284.7e12, rel=1e-3)
    assert flop(prefill, "attention") == 80 * 2 * 64 * 2048**2 * 256
    assert prefill.cache_bytes == 327_680 * 2048
    assert token.cache_bytes == 327_680 * (2048 + 64)
    assert prefill.activation_bytes == pytest.approx(1173 * 2**20, rel=0.05)
    assert (prefill.count, token.count) == (1, 63)


def test_llama_70b_layer_moves_what_was_traced():
    prefill, _ = llama_70b(Workload(prompt_tokens=2048))
    moved = {work.kind: work.traffic_bytes - work.weight_bytes for work in prefill.blocks[0].works}
    assert moved["memory"] == pytest.approx(2376e6, rel=0.03)
    assert moved["matmul"] == pytest.approx(663e6, rel=0.3)
    assert moved["attention"] == pytest.approx(75.5e6, rel=0.05)
    assert prefill.blocks[0].activation_bytes == 400 * 2**20


def test_a_token_reads_every_weight_once():
    _, token = llama_70b(Workload(prompt_tokens=16, batch=4))
    read = sum(work.weight_bytes for block in token.blocks for work in block.works)
    assert read == 80 * 2 * LLAMA_70B_LAYER
    assert flop(token, "matmul") == 4 * 2 * (80 * LLAMA_70B_LAYER + 128256 * 8192)


def test_equal_layers_share_their_work():
    prefill, _ = llama_70b(Workload())
    assert len({id(block) for block in prefill.blocks}) == 1


def test_latent_attention_keeps_the_latent():
    deepseek = SimpleNamespace(hidden_size=7168, num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
    deepseek.qk_nope_head_dim = deepseek.v_head_dim = 128
    shape = language_shape(deepseek, blocks(61, 10**6), 2, generates=True)
    assert shape.cache_bytes(1) == 70_272
    assert shape.layers[0].attention.key_size == 192


def test_sliding_layers_keep_their_window_alone():
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    shape = language_shape(config, blocks(2, 1000), 2, generates=True)
    assert shape.cache_bytes(100) == 2 * 2 * 16 * 2 * (8 + 100)


def test_linear_attention_keeps_no_keys():
    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, layer_types=["linear_attention", "full_attention"])
    shape = language_shape(config, blocks(2, 1000), 2, generates=True)
    assert [layer.attention is None for layer in shape.layers] == [True, False]


def test_composite_configs_are_asked_for_their_text_part():
    config = SimpleNamespace(get_text_config=lambda: LLAMA_70B, hidden_size=1)
    assert language_shape(config, blocks(1, 1000), 2, generates=True).width == 8192


def test_an_encoder_runs_once_and_keeps_nothing():
    shape = language_shape(LLAMA_70B, blocks(2, 1000), 2, generates=False)
    (encode,) = language_model_profiles(shape, Workload())
    assert (encode.name, encode.cache_bytes, shape.head_count) == ("encode", 0, 0)


def test_an_answer_of_one_token_is_the_prefill():
    assert [profile.name for profile in llama_70b(Workload(new_tokens=1))] == ["prefill"]


def test_a_token_reads_its_experts_and_a_prompt_most_of_them():
    layer = Layer(1000, 2000, Attention(4, 16, 16, 128), Routed(128, 8, 500, 1000))
    prefill, token = language_model_profiles(LanguageShape((layer,), 64, 128), Workload(prompt_tokens=64, new_tokens=2))
    experts = [profile.blocks[0].works[1] for profile in (prefill, token)]
    assert experts[1].weight_bytes == 8 * 1000
    assert experts[1].flop == 2 * 8 * 500
    assert experts[0].weight_bytes == round(128 * (1 - (120 / 128) ** 64)) * 1000
    assert experts[0].flop == 64 * 2 * 8 * 500


def test_experts_of_a_block_are_taken_apart_from_the_rest():
    made = blocks(1, 10_000, experts=Experts(4, 4000, 2))
    layer = language_shape(LLAMA_70B, made, 2, generates=True).layers[0]
    assert (layer.weight_count, layer.weight_bytes) == (2000, 4000)
    assert layer.routed == Routed(4, 2, 2000, 4000)


def test_a_layer_that_does_not_run_costs_nothing():
    layer = Layer(1000, 2000, Attention(4, 16, 16, 128), runs=False)
    prefill, _ = language_model_profiles(LanguageShape((layer,), 64, 128), Workload())
    assert (prefill.blocks[0].calls, prefill.blocks[0].works, prefill.cache_bytes) == (0, (), 0)


def flux(workload):
    double = DiffusionLayer(12 * 3072**2, 12 * 3072**2, 36 * 3072**2 * 2, 3072, joint=True)
    single = DiffusionLayer(12 * 3072**2, 12 * 3072**2, 15 * 3072**2 * 2, 3072, joint=True)
    return diffusion_profiles(DiffusionShape((double,) * 19 + (single,) * 38, 3072), workload)[0]


def test_flux_denoising_step():
    denoise = flux(Workload(height=1024, width=1024, steps=50))
    assert flop(denoise, "matmul") == pytest.approx(59.5e12, rel=1e-3)
    assert flop(denoise, "attention") == 57 * 4 * 4608**2 * 3072
    assert denoise.activation_bytes == pytest.approx(468 * 2**20, rel=0.05)
    assert denoise.count == 50
    for block, traced in ((denoise.blocks[0], 3639e6), (denoise.blocks[19], 3497e6)):
        assert next(work.traffic_bytes for work in block.works if work.kind == "memory") == pytest.approx(traced, rel=0.03)


def test_a_host_s_config_gives_the_same_flux():
    config = {"num_attention_heads": 24, "attention_head_dim": 128}
    made = [*blocks(19, 36 * 3072**2), *blocks(38, 15 * 3072**2)]
    (denoise,) = diffusion_profiles(diffusion_shape(config, made, 2, guided=False), Workload())
    assert flop(denoise, "matmul", "attention") == flop(flux(Workload()), "matmul", "attention")


def test_guidance_and_batch_multiply_the_work():
    layer = DiffusionLayer(1000, 1000, 2000, 64, joint=True)
    (once,) = diffusion_profiles(DiffusionShape((layer,), 64), Workload())
    (twice,) = diffusion_profiles(DiffusionShape((layer,), 64, guided=True), Workload(batch=2))
    assert flop(twice, "matmul", "attention") == 4 * flop(once, "matmul", "attention")
    assert twice.activation_bytes == 4 * once.activation_bytes


def test_tokens_of_images_and_clips():
    assert image_tokens(Workload()) == 4096
    assert image_tokens(Workload(height=17, width=16)) == 2
    assert image_tokens(Workload(height=480, width=832, frames=81)) == 30 * 52 * 21


def test_decoding_with_the_vae_of_flux():
    decode = decoder_profile(decoder_shape((128, 256, 512, 512), 4, 2), Workload())
    assert flop(decode, "conv") == pytest.approx(9.8881e12, rel=1e-4)  # traced: diffusers 0.42's AutoencoderKL at 1024 x 1024
    assert flop(decode, "attention") == pytest.approx(0.5498e12, rel=1e-3)
    assert sum(work.traffic_bytes for work in decode.outside if work.kind == "memory") == pytest.approx(23.5e9, rel=0.05)
    assert decode.activation_bytes == 1536 * 2**20
    assert [block.calls for block in decode.blocks] == [0, 0, 0, 0]
