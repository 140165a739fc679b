"""Routed experts in the facts of a component: exact bytes of records and of what is left without them, and which can be kept apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from overflowml_core.facts import Component
from overflowml_core.layout import align, slab_bytes
from overflowml_core.planner.expert_pace import slot_bytes as planned_slot_bytes
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.experts.seat import slot_bytes

_BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 40,
}
_BANK = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_NEXT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}

SEPARABLE = {
    "qwen3_moe": (tf.Qwen3MoeConfig, {**_BASE, **_BANK, "num_experts": 6, "head_dim": 8}, 3),
    "mixtral": (tf.MixtralConfig, {**_BASE, "num_local_experts": 6, "num_experts_per_tok": 2}, 3),
    "gpt_oss": (tf.GptOssConfig, {**_BASE, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}, 3),
    "deepseek_v3": (tf.DeepseekV3Config, {**_BASE, **_BANK, **_DEEPSEEK}, 2),
    "qwen3_next": (tf.Qwen3NextConfig, {**_BASE, **_BANK, **_NEXT, "num_experts": 6, "head_dim": 8}, 3),
    "glm4_moe": (tf.Glm4MoeConfig, {**_BASE, **_BANK, "n_routed_experts": 6, "first_k_dense_replace": 1, "head_dim": 8}, 2),
    "nemotron_h": (
        tf.NemotronHConfig,
        {**_BASE, **_BANK, **_MAMBA, "n_routed_experts": 6, "layers_block_type": ["mamba", "moe", "attention"], "head_dim": 8},
        1,
    ),
}


def _model(config: tf.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _described(model: nn.Module) -> Component:
    return describe_module(model, "model")


@pytest.mark.parametrize("name", SEPARABLE)
def test_records_and_what_is_left_without_them_are_exact(name: str) -> None:
    kind, options, banks = SEPARABLE[name]
    model = _model(kind(**options))
    found = [block for block in _described(model).blocks if block.experts is not None]
    assert len(found) == banks
    for block in found:
        experts, inside = block.experts, model.get_submodule(block.name)
        own = {path: p for path, p in inside.named_parameters() if ".experts." in f".{path}"}
        rest = [p.nbytes for path, p in inside.named_parameters() if path not in own]
        assert experts.separable
        assert experts.per_token == 2
        assert {p.shape[0] for p in own.values()} == {experts.count}
        assert experts.nbytes == sum(align(p.nbytes // experts.count) for p in own.values())
        assert experts.dense_bytes == slab_bytes(rest)
        assert block.slab_bytes == slab_bytes([p.nbytes for p in inside.parameters()])


def test_classes_that_read_the_whole_stack_are_not_separable() -> None:
    config = tf.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    experts = [block.experts for block in _described(_model(config)).blocks]
    assert {e.separable for e in experts} == {False}
    assert all(e.dense_bytes > 0 and e.count == 4 and e.per_token == 2 for e in experts)


def test_experts_in_a_list_are_found_by_their_number() -> None:
    config = tf.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=5,
        num_sparse_encoder_layers=1,
    )
    with torch.device("meta"):
        model = tf.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16)
    found = [block.experts for block in _described(model).blocks if block.experts is not None]
    assert found
    for experts in found:
        assert (experts.count, experts.per_token, experts.separable) == (5, 1, True)
        assert experts.nbytes == 2 * align(32 * 48 * 2)


class _Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)


class _Layer(nn.Module):
    def __init__(self, banks: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.gate = nn.Linear(8, len(widths))
        self.banks = nn.ModuleDict({str(i): nn.ModuleList(_Expert(width) for width in widths) for i in range(banks)})


class _Model(nn.Module):
    def __init__(self, banks: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_experts=len(widths), num_experts_per_tok=2)
        self.layers = nn.ModuleList(_Layer(banks, widths) for _ in range(2))


@pytest.mark.parametrize(("banks", "widths", "separable"), [(1, (16,) * 4, True), (2, (16,) * 4, False), (1, (16, 16, 16, 24), False)])
def test_one_bank_of_equal_experts_is_separable(banks: int, widths: tuple[int, ...], separable: bool) -> None:
    for block in _described(_Model(banks, widths)).blocks:
        assert block.experts is not None
        assert block.experts.separable is separable
        assert block.experts.dense_bytes == slab_bytes([8 * 4 * 4, 4 * 4])


def test_counts_that_differ_by_layer_are_the_largest() -> None:
    class _Heterogeneous:
        per_layer_config = (SimpleNamespace(num_experts=None), SimpleNamespace(num_experts=4))
        num_experts_per_tok = (1, 2)

        @property
        def num_experts(self) -> int:
            raise RuntimeError("'num_experts' is a per-layer attribute and may vary across layers")

    model = _Model(1, (16,) * 4)
    model.config = _Heterogeneous()
    assert [(b.experts.count, b.experts.per_token) for b in _described(model).blocks] == [(4, 2)] * 2


@pytest.mark.parametrize("in_ram", [False, True])
def test_slots_are_as_large_as_planned(in_ram: bool) -> None:
    assert planned_slot_bytes(3 * 512, in_ram) == slot_bytes(3 * 512, in_ram)
