"""What passes of transformers models compute and hold: by hand, from folders as from live models, by arithmetic where code cannot run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from overflowml_core.errors import NotAModel
from overflowml_core.facts import Experts, Linear, Network, PassProfile, Workload
from overflowml_transformers import describe, overflowml_describe, overflowml_measure, profile
from tests.hosts import models

Saved = Callable[..., Path]
_CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


def measured(source: Any, workload: Workload | None = None, **options: Any) -> Network:
    wanted = workload or Workload(prompt_tokens=10, new_tokens=4)
    network = overflowml_describe(source, wanted, options)
    assert network is not None
    found = overflowml_measure(source, network, wanted, options)
    assert found is not None
    (before,), (after,) = network.components, found.components
    kept = replace(
        after,
        profiles=before.profiles,
        activation_bytes=before.activation_bytes,
        activation_source=before.activation_source,
    )
    assert replace(found, components=(kept,)) == network, "a profile changes nothing else"
    return found


def passes(source: Any, workload: Workload | None = None, **options: Any) -> dict[str, PassProfile]:
    (component,) = measured(source, workload, **options).components
    return {found.name: found for found in component.profiles}


def live(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()


# ---- by hand


def test_a_llama_by_hand() -> None:
    found = passes(live(tf.LlamaConfig(**_LLAMA)))
    assert list(found) == ["prefill", "token"]
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64
    head = 2 * 32 * 128
    assert found["prefill"].flop == 4 * (2 * 10 * layer + 4 * 10 * 10 * 32) + head
    assert found["token"].flop == 4 * (2 * layer + 4 * 13 * 32) + head, "10 of the prompt and 3 of the answer are seen by the last pass"
    assert [p.count for p in found.values()] == [1, 3]
    assert all(p.source == "traced" and not p.note for p in found.values())
    for each in found.values():
        assert [sum(work.weight_bytes for work in block.works) for block in each.blocks] == [2 * (layer + 2 * 32)] * 4


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_of_grouped_keys_and_values(batch: int) -> None:
    found = passes(live(tf.LlamaConfig(**_LLAMA)), Workload(prompt_tokens=10, new_tokens=4, batch=batch))
    token = 2 * 4 * 2 * 8 * 2  # keys and values of 4 layers, 2 heads of 8, two bytes
    assert found["prefill"].cache_bytes == batch * 10 * token
    assert found["token"].cache_bytes == batch * 13 * token
    assert all(p.activation_bytes > p.cache_bytes for p in found.values())


def test_cache_of_latent_attention() -> None:
    config = models.FAMILIES["deepseek_v3"].make()
    found = passes(live(config))
    width = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    assert found["prefill"].cache_bytes == 10 * width
    assert found["token"].cache_bytes == 13 * width


def test_cache_of_a_sliding_window_stops_growing() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=16, layer_types=kinds)
    layer = 2 * 2 * 8 * 2
    short = passes(live(config), Workload(prompt_tokens=64, new_tokens=2))["token"].cache_bytes
    long = passes(live(config), Workload(prompt_tokens=164, new_tokens=2))["token"].cache_bytes
    assert long - short == 100 * 2 * layer, "only two of four layers see everything"


def test_state_of_a_recurrent_model_does_not_grow() -> None:
    config = tf.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, head_dim=8, num_heads=8, n_groups=1, state_size=4, vocab_size=128, chunk_size=16
    )
    found = passes(live(config))
    assert found["prefill"].cache_bytes == found["token"].cache_bytes > 0
    assert passes(live(config), Workload(prompt_tokens=50, new_tokens=4))["token"].cache_bytes == found["token"].cache_bytes


def test_one_new_token_needs_no_further_pass() -> None:
    assert list(passes(live(tf.LlamaConfig(**_LLAMA)), Workload(prompt_tokens=10, new_tokens=1))) == ["prefill"]


def test_a_longer_prompt_takes_more() -> None:
    model = live(tf.LlamaConfig(**_LLAMA))
    short, long = (passes(model, Workload(prompt_tokens=n, new_tokens=2)) for n in (64, 128))
    for name in ("prefill", "token"):
        assert long[name].activation_bytes > short[name].activation_bytes
        assert long[name].flop > short[name].flop


def test_assumed_tokens_stay_within_the_positions() -> None:
    config = tf.LlamaConfig(**{**_LLAMA, "max_position_embeddings": 64})
    found = passes(live(config), Workload())
    assert found["token"].count == 31
    assert found["prefill"].cache_bytes == 32 * 2 * 4 * 2 * 8 * 2


# ---- experts


def test_a_token_reads_the_experts_that_it_is_routed_to() -> None:
    model = live(models.FAMILIES["qwen3_moe"].make())
    (component,) = measured(model).components
    one = 3 * 32 * 16 * 2
    dense = component.blocks[0].stored_bytes - 4 * one
    rest_bytes = component.blocks[0].slab_bytes - 4 * one
    matrices = (Linear(32, 16, "BF16"), Linear(32, 32, "BF16"))
    assert [block.experts for block in component.blocks] == [Experts(4, one, 2, rest_bytes, matrices=matrices)] * 4
    prefill, token = component.profiles
    assert sum(work.weight_bytes for work in prefill.blocks[0].works) == dense + 4 * one
    assert sum(work.weight_bytes for work in token.blocks[0].works) == dense + 2 * one


def test_biases_of_stacked_experts_belong_to_them() -> None:
    config = tf.GptOssConfig(**{**_LLAMA, "intermediate_size": 16}, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    (component,) = measured(live(config)).components
    experts = component.blocks[0].experts
    # Each tensor of a record begins on the alignment of slabs: 512 bytes.
    assert (experts.count, experts.nbytes, experts.per_token) == (4, 2 * 32 * 32 + 512 + 2 * 16 * 32 + 512, 2)
    # gpt-oss keeps inputs by outputs; a matrix is told as outputs by inputs.
    assert experts.matrices == (Linear(32, 16, "BF16"), Linear(32, 32, "BF16"))


def test_dense_blocks_have_no_experts_and_count_their_linear_layers() -> None:
    (component,) = measured(live(tf.LlamaConfig(**_LLAMA))).components
    assert [block.experts for block in component.blocks] == [None] * 4
    assert [block.linear_count for block in component.blocks] == [block.weight_count - 2 * 32 for block in component.blocks]


# ---- sources


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "t5", "clip", "llava"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_a_folder_and_the_live_model_have_one_profile(name: str, options: dict[str, Any], saved: Saved) -> None:
    folder = saved(name)
    model = getattr(tf, models.FAMILIES[name].model).from_pretrained(folder, **options)
    ours, theirs = measured(folder, **options), measured(model)
    assert ours.components == theirs.components
    assert ours.components[0].activation_source == "traced"


def test_measuring_leaves_a_live_model_as_it_was() -> None:
    model = live(tf.LlamaConfig(**_LLAMA))
    before, config = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}, copy.deepcopy(model.config)
    state = torch.random.get_rng_state()
    measured(model)
    assert {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_config_alone_is_a_model(tmp_path: Path) -> None:
    config = tf.LlamaConfig(**_LLAMA, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    found = measured(tmp_path)
    assert found.source == f"{tmp_path} (config only)"
    assert found.components[0].bytes_by_dtype == (("BF16", live(config).num_parameters() * 2),)
    assert found.components == measured(live(config)).components
    assert measured(tmp_path, dtype="float32").components[0].bytes_by_dtype[0][0] == "F32"
    config.dtype = "float16"
    config.save_pretrained(tmp_path)
    assert measured(tmp_path).components[0].bytes_by_dtype[0][0] == "F16"


def test_a_config_alone_keeps_in_float32_what_loading_keeps(tmp_path: Path, saved: Saved) -> None:
    folder = saved("t5")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours = overflowml_describe(tmp_path, Workload(), {"dtype": torch.float16})
    theirs = overflowml_describe(folder, Workload(), {"dtype": torch.float16})
    assert ours is not None
    assert theirs is not None
    assert ours.fingerprint == theirs.fingerprint
    assert dict(ours.components[0].bytes_by_dtype).keys() == {"F16", "F32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "many"}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": -8}, "config.json"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"model_type": "no_such_type"}, "config.json"),
        ({"architectures": None}, "not named"),
    ],
)
def test_a_config_that_no_model_can_be_built_from(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**_LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotAModel, match=message):
        overflowml_describe(tmp_path, Workload(), {})


def test_a_changed_config_is_built_anew(tmp_path: Path) -> None:
    tf.LlamaConfig(**_LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert len(measured(tmp_path).components[0].profiles[0].blocks) == 4
    tf.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 2}, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert len(measured(tmp_path).components[0].profiles[0].blocks) == 2


# ---- kinds of models


def test_an_encoder_decoder_encodes_once() -> None:
    config = models.FAMILIES["t5"].make()
    found = passes(tf.T5ForConditionalGeneration(config).eval())
    assert [(p.name, p.count) for p in found.values()] == [("encode", 1), ("prefill", 1), ("token", 3)]
    ran = {name: [block.calls for block in each.blocks] for name, each in found.items()}
    layers = config.num_layers
    assert ran["encode"] == [1] * layers + [0] * config.num_decoder_layers
    assert ran["token"] == ran["prefill"] == [0] * layers + [1] * config.num_decoder_layers


def test_an_image_goes_through_the_vision_tower() -> None:
    found = passes(tf.LlavaForConditionalGeneration(models.FAMILIES["llava"].make()).eval())
    assert list(found) == ["encode", "prefill", "token"]
    assert found["encode"].note == "one image"
    busy = {name: {i for i, block in enumerate(each.blocks) if block.calls} for name, each in found.items()}
    assert busy["encode"]
    assert not busy["encode"] & busy["prefill"]


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_has_a_profile(name: str) -> None:
    family = models.FAMILIES[name]
    model = getattr(tf, family.model)(family.make()).eval()
    (component,) = measured(model, Workload(prompt_tokens=12, new_tokens=3)).components
    assert component.activation_source == "traced"
    assert component.activation_bytes == max(p.activation_bytes for p in component.profiles)
    assert all(len(p.blocks) == len(component.blocks) for p in component.profiles)
    assert all(p.flop > 0 for p in component.profiles)
    ran = {i for p in component.profiles for i, block in enumerate(p.blocks) if block.calls}
    assert ran == set(range(len(component.blocks)))


# ---- where code cannot run


def test_code_that_goes_token_after_token_is_continued_from_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = live(models.FAMILIES["mamba"].make())
    work = Workload(prompt_tokens=65, new_tokens=3)
    short = passes(model, work)
    monkeypatch.setattr(profile, "_BLOCK_OPERATIONS", 10**6)
    whole = passes(model, work)
    for name, traced in whole.items():
        assert traced.source == "traced"
        assert short[name].source == "analytic"
        assert "16, 32, 48 tokens" in short[name].note
        assert (short[name].flop, short[name].cache_bytes, short[name].count) == (traced.flop, traced.cache_bytes, traced.count)
        assert short[name].activation_bytes == pytest.approx(traced.activation_bytes, rel=0.05)


def test_code_that_reads_values_is_estimated_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = live(tf.LlamaConfig(**_LLAMA))
    plain = passes(model)
    forward = tf.LlamaForCausalLM.forward

    def reads(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        self.model.embed_tokens(input_ids).nonzero()
        return forward(self, input_ids, **others)

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", reads)
    (component,) = measured(model).components
    assert component.activation_source == "analytic"
    for each in component.profiles:
        assert each.source == "analytic"
        assert "nonzero" in each.note
        assert each.cache_bytes == pytest.approx(plain[each.name].cache_bytes, rel=0.2)
        assert each.flop == pytest.approx(plain[each.name].flop, rel=0.2)


def test_a_model_that_was_changed_after_it_was_built_is_not_traced_as_another() -> None:
    model = live(tf.LlamaConfig(**_LLAMA))
    del model.model.layers[3]
    (component,) = measured(model).components
    assert component.activation_source == "analytic"
    assert "other blocks" in component.profiles[0].note
    assert len(component.profiles[0].blocks) == 3


def test_kernels_of_other_packages_are_traced_as_fused_attention() -> None:
    model = live(tf.LlamaConfig(**_LLAMA))
    plain = passes(model)
    pattern = describe.Pattern.of(model)
    pattern.config._attn_implementation_internal = "flash_attention_2"
    network = overflowml_describe(model, Workload(), {})
    assert network is not None
    found = profile.measure_model(pattern, network, Workload(prompt_tokens=10, new_tokens=4))
    assert {p.name: p for p in found.components[0].profiles} == plain


# ---- large ones, from their configs alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weight_gb", "token_bytes"),
    [("llama-3.1-70b", 141.1, 327_680), ("qwen3-235b-a22b", 470.2, 192_512), ("deepseek-v3", 1342.1, 70_272)],
)
def test_full_size_models_without_weights(name: str, weight_gb: float, token_bytes: int) -> None:
    (component,) = measured(_CONFIGS / name, Workload(prompt_tokens=512, new_tokens=2)).components
    assert component.weight_bytes / 1e9 == pytest.approx(weight_gb, abs=0.1)
    prefill, token = component.profiles
    assert prefill.source == token.source == "traced"
    assert (prefill.cache_bytes, token.cache_bytes) == (512 * token_bytes, 513 * token_bytes)
