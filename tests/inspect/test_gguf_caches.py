"""What a layer keeps of a sequence is what llama.cpp allocates for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from overflowml_core.inspect.gguf import GgufModel
from overflowml_core.inspect.gguf_caches import LayerCache, layer_caches
from overflowml_core.inspect.gguf_keys import Keys

WIDTH = 256
ATTENTION = frozenset({"attn_q.weight", "attn_k.weight", "attn_v.weight"})
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}


def caches(architecture, layers, names=ATTENTION, **more):
    keys = HEADS | {key.replace("__", "."): value for key, value in more.items()}
    metadata = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    metadata[f"{architecture}.embedding_length"] = WIDTH
    members = {i: names[i] if isinstance(names, list) else names for i in range(layers)}
    found = layer_caches(Keys(GgufModel((Path("m.gguf"),), metadata, ()), architecture, layers), WIDTH, members)
    return [found[i] for i in range(layers)]


def windows(*arguments, **more):
    return [cache.window for cache in caches(*arguments, **more)]


def test_grouped_heads_keep_keys_and_values_of_their_groups():
    assert caches("llama", 1) == [LayerCache(128, 128, 64, 64)]
    assert caches("llama", 1, attention__head_count_kv=None) == [LayerCache(256, 256, 64, 64)]
    assert caches("llama", 1, attention__key_length=32, attention__value_length=16) == [LayerCache(64, 32, 32, 16)]


def test_heads_of_each_layer():
    found = caches("deci", 3, attention__head_count=(4, 0, 4), attention__head_count_kv=(1, 0, 2))
    assert [(cache.key_count, cache.value_count) for cache in found] == [(64, 64), (0, 0), (128, 128)]


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("gemma3", {"attention__sliding_window": 9}, [9, 9, 9, 9, 9, 0, 9, 9]),
        ("gpt-oss", {"attention__sliding_window": 9}, [9, 0] * 4),
        ("gemma2", {}, [4096, 0] * 4),
        ("smallthinker", {"attention__sliding_window": 9}, [0, 4096, 4096, 4096] * 2),
        ("smallthinker", {}, [4096 if i % 4 else 0 for i in range(8)]),
        ("llama4", {"attention__sliding_window": 0}, [0] * 8),
        ("llama4", {}, [8192, 8192, 8192, 0] * 2),
        ("cohere2moe", {"attention__sliding_window": 9}, [0, 9, 9, 9] * 2),
        ("exaone4", {"attention__sliding_window": 9}, [0] * 8),
        ("lfm2", {"attention__sliding_window": 9}, [9] * 8),
        ("qwen2", {"attention__sliding_window": 9}, [0] * 8),
        ("gemma3", {"attention__sliding_window": 9, "attention__sliding_window_pattern": 2}, [9, 0] * 4),
        ("mimo2", {"attention__sliding_window": 9, "attention__sliding_window_pattern": (True, False) * 4}, [9, 0] * 4),
    ],
)
def test_layers_slide_as_llama_cpp_lets_them(architecture, keys, expected):
    assert windows(architecture, 8, **keys) == expected


def test_sliding_layers_may_have_heads_of_their_own_size():
    found = caches("gemma4", 2, attention__sliding_window=9, attention__sliding_window_pattern=(True, False), attention__key_length_swa=16)
    assert [cache.key_count for cache in found] == [32, 128]


def test_latent_attention_keeps_keys_alone_and_old_files_of_it_everything():
    latent = {"attention__key_length": 576, "attention__value_length": 512, "attention__kv_lora_rank": 512, "attention__head_count_kv": 1}
    new = caches("deepseek2", 1, attention__key_length_mla=192, attention__value_length_mla=128, **latent)
    assert (new[0].key_count, new[0].value_count) == (576, 0)
    old = caches("deepseek2", 1, **(latent | {"attention__key_length": 192, "attention__value_length": 128, "attention__head_count_kv": 4}))
    assert (old[0].key_count, old[0].value_count) == (768, 512)


def test_an_indexer_keeps_keys_beside_those_of_the_attention():
    assert caches("deepseek32", 1, attention__indexer__key_length=32)[0].key_count == 128 + 32


def test_layers_that_share_a_cache_or_only_guess_keep_nothing():
    assert [cache.key_count for cache in caches("gemma4", 4, attention__shared_kv_layers=2)] == [128, 128, 0, 0]
    assert [cache.key_count for cache in caches("glm4moe", 3, nextn_predict_layers=1)] == [128, 128, 0]
    assert sum(cache.key_count > 0 for cache in caches("gemma3n", 30)) == 20


def test_states_of_recurrent_layers():
    mamba = {"ssm__conv_kernel": 4, "ssm__inner_size": 512, "ssm__state_size": 16, "ssm__group_count": 2}
    assert caches("mamba2", 1, frozenset({"ssm_in.weight"}), **mamba)[0].state_bytes == 4 * (3 * (512 + 64) + 512 * 16)
    delta = caches("kimi-linear", 1, frozenset({"ssm_conv1d_q.weight"}), ssm__conv_kernel=4, kda__head_dim=128)
    assert delta[0].state_bytes == 4 * 4 * 128 * (9 + 128)
    rwkv = caches("rwkv7", 1, frozenset({"time_mix_w1.weight"}), wkv__head_size=64, token_shift_count=2)
    assert rwkv[0].state_bytes == 4 * WIDTH * (64 + 2)
    assert caches("lfm2", 1, frozenset({"shortconv.conv.weight"}), shortconv__l_cache=3)[0].state_bytes == 4 * WIDTH * 2


def test_a_linear_layer_of_a_hybrid_keeps_a_state_alone():
    linear = frozenset({"attn_qkv.weight", "ssm_conv1d.weight"})
    found = caches("qwen3next", 2, [linear, ATTENTION], ssm__conv_kernel=4, ssm__inner_size=64, ssm__state_size=16, ssm__group_count=1)
    assert [(cache.key_count, cache.state_bytes) for cache in found] == [(0, 4 * (3 * 96 + 64 * 16)), (128, 0)]
