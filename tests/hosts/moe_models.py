"""Tiny models with routed experts, of the real classes and with random weights, and the calls that show a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

TOKENS = torch.tensor([[5, 17, 42, 3, 88, 61, 20, 9, 33, 71, 11, 2]])
PADDED = torch.tensor([[0, 0, 0, 5, 17, 42], [3, 88, 61, 20, 9, 33]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
HIDDEN = 32
_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
}
_FINE = {"moe_intermediate_size": 16}
_GROUPED = {**_FINE, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_SWITCH = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 96}
_NLLB = {"d_model": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 96, "num_experts": 4, "max_position_embeddings": 64}
_HYBRID = {"layers_block_type": ["mamba", "moe", "full_attention", "moe"], "mlp_hidden_act": "relu2", "use_mamba_kernels": False}
_MAMBA = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "expand": 2}

DECODERS: dict[str, Callable[[], Any]] = {
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**_TEXT, **_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "glm4_moe": lambda: tf.Glm4MoeConfig(**_TEXT, **_GROUPED),
    "gpt_oss": lambda: tf.GptOssConfig(**_TEXT, num_local_experts=8, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**_TEXT, num_local_experts=8),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **{**_TEXT, **_GROUPED, **_HYBRID, **_MAMBA, "n_group": 1}, moe_shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_TEXT, **_FINE, num_experts=8),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **{**_TEXT, **_FINE, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        num_experts=8,
        shared_expert_intermediate_size=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
TRANSLATORS: dict[str, Callable[[], Any]] = {
    "nllb_moe": lambda: tf.NllbMoeConfig(
        **_NLLB,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=1,
        decoder_sparse_step=2,
    ),
    "switch_transformers": lambda: tf.SwitchTransformersConfig(
        **_SWITCH, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of this family that takes no gradients. Biases and what corrects routing are not zero, as they are when made.

    Args:
        name: of the family.
        dtype: of its weights.
        changes: of its configuration.
    """
    torch.manual_seed(11)
    config = (DECODERS.get(name) or TRANSLATORS[name])()
    config.update(changes)
    model = (tf.AutoModelForCausalLM if name in DECODERS else tf.AutoModelForSeq2SeqLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        for path, buffer in model.named_buffers():
            if "correction" in path:
                buffer.add_(torch.rand(buffer.shape) * 0.01)
    return model.to(dtype).eval().requires_grad_(False)
