"""A GGUF file becomes a network: exact bytes, experts by its tensors, caches by its metadata; contradictions are errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from overflowml_core.errors import BadCheckpoint, NotAModel
from overflowml_core.facts import Experts, Workload
from overflowml_core.inspect.gguf_network import network_of_gguf

_spec = importlib.util.spec_from_file_location("gguf_files", Path(__file__).with_name("gguf_files.py"))
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

ASKED = Workload(prompt_tokens=100, new_tokens=28)


def describe(folder, metadata, tensors, workload=ASKED):
    path = folder / "model.gguf"
    path.write_bytes(files.gguf_file(metadata, tensors))
    return network_of_gguf(path, workload)


def component(folder, metadata, tensors, workload=ASKED):
    return describe(folder, metadata, tensors, workload).components[0]


def refused(folder, metadata, tensors, words, kind=BadCheckpoint):
    with pytest.raises(kind, match=words) as caught:
        describe(folder, metadata, tensors)
    assert "\n" not in str(caught.value)


def test_a_dense_model(tmp_path):
    metadata, tensors = files.llama()
    found = component(tmp_path, metadata, tensors)
    assert [block.name for block in found.blocks] == ["blk.0", "blk.1"]
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128
    assert found.blocks[0].linear_count == layer
    assert found.blocks[0].stored_bytes == 2 * layer + 4 * 64
    assert found.weight_bytes == 2 * (2 * layer + 4 * 64) + 2 * 2 * 96 * 64 + 4 * 64
    assert not found.blocks[0].keep_format
    prefill, token = found.profiles
    assert (prefill.name, prefill.count, token.name, token.count) == ("prefill", 1, "token", 27)
    matmul = sum(work.flop for block in prefill.blocks for work in block.works if work.kind == "matmul")
    assert matmul == 2 * 100 * 2 * layer
    assert token.cache_bytes == 2 * 2 * 2 * 16 * 128 * 2  # keys and values, layers, heads, size, tokens, bytes
    assert prefill.source == "analytic"
    assert "llama" in prefill.note


def test_packed_weights_keep_their_format(tmp_path):
    metadata, tensors = files.llama(width=256, heads=4, feedforward=512, type_name="Q4_K")
    found = component(tmp_path, metadata, tensors)
    assert all(block.keep_format and block.linear_count == 0 for block in found.blocks)
    assert dict(found.blocks[0].bytes_by_dtype)["Q4_K"] == sum(
        files.tensor_bytes(t, s) for n, t, s in tensors if n.startswith("blk.0.") and t != "F32"
    )


def moe(count=8, per_token=2, **more):
    metadata, tensors = files.llama(expert_count=count, expert_used_count=per_token, expert_feed_forward_length=32, **more)
    tensors = [t for t in tensors if "ffn_" not in t[0]]
    for i in range(2):
        tensors += [(f"blk.{i}.ffn_gate_inp.weight", "F32", (count, 64))]
        tensors += [(f"blk.{i}.ffn_{name}_exps.weight", "Q8_0", (count, 32, 64)) for name in ("gate", "up")]
        tensors += [(f"blk.{i}.ffn_down_exps.weight", "Q8_0", (count, 64, 32))]
    return metadata, tensors


def test_experts_are_found_by_their_tensors(tmp_path):
    found = component(tmp_path, *moe())
    one = 3 * 32 * 64 // 32 * 34
    assert found.blocks[0].experts == Experts(8, one, 2)
    token = found.profiles[1]
    read = [work.weight_bytes for work in token.blocks[0].works if work.kind == "matmul"]
    assert read[1] == 2 * one


def test_experts_that_are_not_stacked_are_counted(tmp_path):
    metadata, tensors = files.llama(expert_count=4, expert_used_count=2)
    tensors = [t for t in tensors if "ffn_" not in t[0]]
    tensors += [(f"blk.{i}.ffn_{name}.{e}.weight", "F16", (64, 64)) for i in range(2) for e in range(4) for name in ("gate", "up", "down")]
    assert component(tmp_path, metadata, tensors).blocks[1].experts == Experts(4, 3 * 64 * 64 * 2, 2)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (moe(per_token=9), "a token uses 9"),
        (moe(per_token=0), "a token uses 0"),
    ],
)
def test_experts_that_cannot_be_are_refused(tmp_path, made, words):
    refused(tmp_path, *made, words)


def test_a_count_of_experts_that_the_tensors_deny_is_refused(tmp_path):
    metadata, tensors = moe()
    refused(tmp_path, metadata | {"llama.expert_count": 128}, tensors, "metadata says 128")


def cache_of(folder, tokens=128, **keys):
    metadata, tensors = files.llama(layers=6, **keys)
    return component(folder, metadata, tensors).profiles[-1].cache_bytes


def test_latent_attention_caches_the_latent_alone(tmp_path):
    keys = {"attention.kv_lora_rank": 512, "rope.dimension_count": 64, "attention.key_length_mla": 192, "attention.value_length_mla": 128}
    assert cache_of(tmp_path, **keys) == 6 * (512 + 64) * 2 * 128


def test_a_sliding_window_bounds_the_cache_of_its_layers(tmp_path):
    a_token = 2 * 2 * 16 * 2
    assert cache_of(tmp_path) == 6 * a_token * 128
    window = {"attention.sliding_window": 16}
    assert cache_of(tmp_path, **window) == 6 * a_token * 128  # nobody says which layers slide
    assert cache_of(tmp_path, **window, **{"attention.sliding_window_pattern": 3}) == a_token * (2 * 128 + 4 * 16)
    each = [True, False, True, True, True, True]
    assert cache_of(tmp_path, **window, **{"attention.sliding_window_pattern": each}) == a_token * (128 + 5 * 16)


def test_layers_without_keys_have_no_cache_and_recurrent_ones_a_state(tmp_path):
    metadata, tensors = files.llama(
        **{
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 128,
            "ssm.state_size": 16,
            "attention.head_count": [0, 4],
            "attention.head_count_kv": [0, 2],
        }
    )
    tensors = [t for t in tensors if not t[0].startswith("blk.0.attn_")] + [("blk.0.ssm_conv1d.weight", "F32", (128, 4))]
    profiles = component(tmp_path, metadata, tensors).profiles
    assert profiles[1].cache_bytes == 2 * 2 * 16 * 2 * 128 + 4 * (3 * 128 + 128 * 16)


def test_layers_that_guess_further_tokens_are_not_run(tmp_path):
    metadata, tensors = files.llama(layers=3, nextn_predict_layers=1)
    found = component(tmp_path, metadata, tensors)
    assert [work.calls for work in found.profiles[1].blocks] == [1, 1, 0]
    assert found.blocks[2].stored_bytes == found.blocks[1].stored_bytes


def test_an_encoder_runs_once_and_keeps_nothing(tmp_path):
    metadata, tensors = files.llama(**{"attention.causal": False})
    profiles = component(tmp_path, metadata, tensors).profiles
    assert [(p.name, p.count, p.cache_bytes) for p in profiles] == [("encode", 1, 0)]


def test_an_image_model_is_profiled_as_one(tmp_path):
    tensors = []
    for i in range(2):
        for stream in ("img", "txt"):
            tensors += [
                (f"double_blocks.{i}.{stream}_attn.qkv.weight", "Q8_0", (192, 64)),
                (f"double_blocks.{i}.{stream}_mlp.0.weight", "Q8_0", (256, 64)),
            ]
            tensors += [(f"double_blocks.{i}.{stream}_mod.lin.weight", "Q8_0", (384, 64))]
        tensors += [(f"single_blocks.{i}.linear1.weight", "Q8_0", (448, 64))]
    found = component(tmp_path, {"general.architecture": "flux"}, tensors, Workload(height=256, width=256, steps=4))
    assert [block.name for block in found.blocks] == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    (denoise,) = found.profiles
    assert (denoise.name, denoise.count) == ("denoise", 4)
    assert "FluxTransformer2DModel" in denoise.note
    matmul = [sum(work.flop for work in block.works if work.kind == "matmul") for block in denoise.blocks]
    assert matmul == [2 * (256 + 512) * 448 * 64] * 4  # each token meets its own stream; modulation is once a sample


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.block_count": 10**9}, "block_count is 1000000000, its tensors make 2 blocks"),
        ({"llama.block_count": 1}, "block_count is 1, its tensors make 2"),
        ({"llama.block_count": "two"}, "block_count is two"),
        ({"llama.block_count": True}, "block_count is True"),
        ({"llama.attention.head_count": [4]}, "one for each of 2"),
        ({"llama.attention.head_count": 2**31}, "attention.head_count is 2147483648"),
        ({"llama.attention.head_count_kv": (files.INT32, -1)}, "head_count_kv is -1"),
        ({"llama.embedding_length": "wide"}, "embedding_length is wide"),
        ({"llama.attention.sliding_window": 0.5}, "sliding_window is 0.5"),
        ({"general.architecture": ""}, "general.architecture"),
        ({"general.architecture": 7}, "general.architecture is 7"),
    ],
)
def test_metadata_that_cannot_be_is_named(tmp_path, keys, words):
    metadata, tensors = files.llama()
    refused(tmp_path, metadata | keys, tensors, words)


def test_a_missing_architecture_is_named(tmp_path):
    refused(tmp_path, {"a": 1}, [("w", "F32", (3,))], "general.architecture is None")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count_kv"])
def test_a_missing_key_is_read_off_the_tensors_or_defaulted(tmp_path, key):
    metadata, tensors = files.llama()
    del metadata[f"llama.{key}"]
    assert len(component(tmp_path, metadata, tensors).blocks) == 2


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.architecture": "llama"}, [], "only a vocabulary"),
        ({"general.architecture": "llama", "general.type": "adapter"}, [("blk.0.attn_q.weight.lora_a", "F32", (3,))], "adapter alone"),
    ],
)
def test_files_without_a_model_are_named(tmp_path, metadata, tensors, words):
    refused(tmp_path, metadata, tensors, words, NotAModel)


def test_the_same_model_has_the_same_fingerprint_in_one_file_and_in_parts(tmp_path):
    metadata, tensors = files.llama()
    whole = describe(tmp_path, metadata, tensors)
    for part, members in enumerate((tensors[:9], tensors[9:])):
        keys = {"split.no": (files.UINT16, part), "split.count": (files.UINT16, 2)} | (metadata if part == 0 else {})
        (tmp_path / f"m-0000{part + 1}-of-00002.gguf").write_bytes(files.gguf_file(keys, members))
    assert network_of_gguf(tmp_path / "m-00002-of-00002.gguf", ASKED).fingerprint == whole.fingerprint
