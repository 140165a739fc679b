"""Tiny transformers models with random weights, by name, and a call of each that shows a wrong weight anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

TOKENS = torch.tensor([[5, 17, 42, 3, 88, 61, 20, 9]])
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: name of its class in transformers.
        make: builds its config.
        call: runs it and returns what must not change.
        generates: whether ``generate`` works on token ids.
    """

    model: str
    make: Callable[[], Any]
    call: Callable[[Any], Any]
    generates: bool = False


def _tokens(model: Any) -> Any:
    return model(TOKENS)


def _seq2seq(model: Any) -> Any:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :4])


def _clip(model: Any) -> Any:
    torch.manual_seed(3)
    pixels = torch.randn(1, 3, 16, 16, dtype=model.dtype)
    return model(input_ids=TOKENS, pixel_values=pixels, attention_mask=torch.ones_like(TOKENS))


def _pixels(model: Any) -> Any:
    torch.manual_seed(3)
    return model(pixel_values=torch.randn(1, 3, 32, 32, dtype=model.dtype))


def _whisper(model: Any) -> Any:
    torch.manual_seed(3)
    return model(input_features=torch.randn(1, 8, 32, dtype=model.dtype), decoder_input_ids=TOKENS[:, :4])


def _sound(model: Any) -> Any:
    torch.manual_seed(3)
    return model(torch.randn(1, 800, dtype=model.dtype))


def _llava(model: Any) -> Any:
    torch.manual_seed(3)
    tokens = torch.cat([torch.full((1, 4), 127), TOKENS], dim=1)
    return model(input_ids=tokens, pixel_values=torch.randn(1, 3, 16, 16, dtype=model.dtype))


def _clip_config() -> Any:
    text = {**_BERT, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**_BERT, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    del vision["vocab_size"], vision["max_position_embeddings"]
    return tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def _siglip_config() -> Any:
    vision = {**_BERT, "image_size": 16, "patch_size": 8}
    del vision["vocab_size"], vision["max_position_embeddings"]
    return tf.SiglipConfig(text_config=_BERT, vision_config=vision)


def _llava_config() -> Any:
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8, projection_dim=16
    )
    return tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**_LLAMA), image_token_index=127, image_seq_length=4)


def _deepseek() -> Any:
    return tf.DeepseekV3Config(
        **{**_LLAMA, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 128, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
_WHISPER = {
    **_BART,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
del _WHISPER["max_position_embeddings"]

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", lambda: tf.LlamaConfig(**_LLAMA), _tokens, True),
    "llama_tied": Family("LlamaForCausalLM", lambda: tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True), _tokens, True),
    "qwen3": Family("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**_LLAMA, head_dim=8), _tokens, True),
    "qwen3_tied": Family("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True), _tokens, True),
    "gpt2": Family("GPT2LMHeadModel", lambda: tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=128, n_positions=64), _tokens, True),
    "gemma3": Family("Gemma3ForCausalLM", lambda: tf.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=16), _tokens, True),
    "bloom": Family("BloomForCausalLM", lambda: tf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=128), _tokens, True),
    "t5": Family("T5ForConditionalGeneration", lambda: tf.T5Config(**_T5), _seq2seq, True),
    "t5_encoder": Family("T5EncoderModel", lambda: tf.T5Config(**_T5), _tokens),
    "bart": Family("BartForConditionalGeneration", lambda: tf.BartConfig(**_BART), _seq2seq, True),
    "bert": Family("BertForMaskedLM", lambda: tf.BertConfig(**_BERT), _tokens),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        lambda: tf.ModernBertConfig(**_BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        _tokens,
    ),
    "clip": Family("CLIPModel", _clip_config, _clip),
    "siglip": Family("SiglipModel", _siglip_config, _clip),
    "vit": Family(
        "ViTForImageClassification",
        lambda: tf.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8),
        _pixels,
    ),
    "llava": Family("LlavaForConditionalGeneration", _llava_config, _llava),
    "whisper": Family("WhisperForConditionalGeneration", lambda: tf.WhisperConfig(**_WHISPER), _whisper),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        lambda: tf.Wav2Vec2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            conv_dim=(8, 8, 8),
            conv_stride=(5, 4, 4),
            conv_kernel=(5, 4, 4),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        _sound,
    ),
    "mixtral": Family("MixtralForCausalLM", lambda: tf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2), _tokens, True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", lambda: tf.Qwen3MoeConfig(**_LLAMA, **_MOE), _tokens, True),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek, _tokens, True),
    "mamba": Family(
        "MambaForCausalLM", lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=128, state_size=4), _tokens, True
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        lambda: tf.Qwen3NextConfig(
            **_LLAMA,
            **_MOE,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        _tokens,
        True,
    ),
}


def build(name: str) -> Any:
    """A model of this family; every weight and every floating buffer that is saved has a value that nothing else has."""
    family = FAMILIES[name]
    torch.manual_seed(11)
    model = getattr(tf, family.model)(family.make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms are ones and fresh biases zeros: a mix-up of them would show nowhere.
            parameter.add_(torch.randn(parameter.shape) * 0.02)
        kept = model.state_dict()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name in kept and buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape) * 0.01)
    return model


def call(name: str, model: Any) -> Any:
    """The family's own call."""
    with torch.no_grad():
        return FAMILIES[name].call(model)


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Six greedy tokens."""
    with torch.no_grad():
        return model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)  # type: ignore[no-any-return]
