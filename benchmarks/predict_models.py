"""The models of predict.py: small ones of the real classes, of many families, with random weights, at sizes that two cores run in about
a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from overflowml import Workload

TEXT = Workload(prompt_tokens=256, new_tokens=8)
LONG = Workload(prompt_tokens=128, new_tokens=64, batch=2)
IMAGE = Workload(height=256, width=256, steps=2)
VIDEO = Workload(height=128, width=128, frames=9, steps=2)


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked to do.

    Attributes:
        name: of the family.
        make: builds it in float32 with random weights.
        workload: what it is asked to do.
        quick: belongs to the short run.
    """

    name: str
    make: Callable[[], Any]
    workload: Workload
    quick: bool = True


_LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
}
_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 12}
_T5 = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 8, "vocab_size": 16384, "feed_forward_proj": "gated-gelu"}
_CLIP = {**_ENCODER, "num_hidden_layers": 4, "vocab_size": 8192, "max_position_embeddings": 77, "projection_dim": 768}


def _transformer(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    return make


def _clip(projected: bool = False, **changes: Any) -> Any:
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return _transformer(kind, "CLIPTextConfig", **{**_CLIP, **changes})()


def _t5_encoder(model: str = "T5EncoderModel", config: str = "T5Config") -> Any:
    return _transformer(model, config, **_T5)()


def _vae(latent_channels: int = 4, **changes: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        **changes,
    )


def _unet(**changes: Any) -> Any:
    import diffusers

    settings = {
        "block_out_channels": (128, 256, 256),
        "layers_per_block": 2,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


def flux() -> Any:
    """FLUX: double and single blocks, two text encoders."""
    import diffusers

    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(),
        tokenizer=None,
        text_encoder_2=_t5_encoder(),
        tokenizer_2=None,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=64,
            num_attention_heads=12,
            joint_attention_dim=512,
            pooled_projection_dim=768,
            axes_dims_rope=(16, 24, 24),
            guidance_embeds=True,
        ),
        vae=_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
    )


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5: a UNet, guided."""
    import diffusers

    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=None,
        unet=_unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> Any:
    """Stable Diffusion 3: a joint transformer, three text encoders, guided."""
    import diffusers

    narrow = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "projection_dim": 256}
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(True, **narrow),
        text_encoder_2=_clip(True, **narrow),
        text_encoder_3=_t5_encoder(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            num_layers=8,
            attention_head_dim=64,
            num_attention_heads=10,
            joint_attention_dim=512,
            caption_projection_dim=640,
            pooled_projection_dim=512,
            out_channels=16,
        ),
        vae=_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
    )


def pixart() -> Any:
    """PixArt-alpha: cross attention to T5."""
    import diffusers

    return diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=_t5_encoder(),
        vae=_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=32,
            num_layers=10,
            attention_head_dim=64,
            num_attention_heads=10,
            caption_channels=512,
            cross_attention_dim=640,
            in_channels=4,
            out_channels=8,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def wan() -> Any:
    """Wan: video, guided by two passes a step."""
    import diffusers

    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=_t5_encoder("UMT5EncoderModel", "UMT5Config"),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=8,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=512,
            ffn_dim=2048,
            num_layers=8,
        ),
        vae=diffusers.AutoencoderKLWan(base_dim=24, z_dim=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


SUBJECTS: tuple[Subject, ...] = (
    Subject("llama", _transformer("LlamaForCausalLM", "LlamaConfig", **_LLAMA), TEXT),
    Subject("gpt2", _transformer("GPT2LMHeadModel", "GPT2Config", n_embd=768, n_layer=8, n_head=12, vocab_size=16384), LONG),
    Subject("qwen3", _transformer("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=64), TEXT),
    Subject(
        "qwen3_moe",
        _transformer(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **{**_LLAMA, "num_hidden_layers": 4},
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=512,
            head_dim=64,
        ),
        TEXT,
    ),
    Subject("gemma3", _transformer("Gemma3ForCausalLM", "Gemma3TextConfig", **_LLAMA, head_dim=64, sliding_window=64), LONG, quick=False),
    Subject("t5", _transformer("T5ForConditionalGeneration", "T5Config", **_T5, decoder_start_token_id=0), TEXT),
    Subject("bert", _transformer("BertModel", "BertConfig", **_ENCODER, vocab_size=8192), Workload(prompt_tokens=256, batch=2)),
    Subject("vit", _transformer("ViTModel", "ViTConfig", **_ENCODER, image_size=224, patch_size=16), Workload(batch=2)),
    Subject(
        "whisper",
        _transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
        ),
        TEXT,
        quick=False,
    ),
    Subject("flux", flux, IMAGE),
    Subject("stable_diffusion", stable_diffusion, IMAGE),
    Subject("sd3", sd3, IMAGE),
    Subject("pixart", pixart, IMAGE),
    Subject("wan", wan, VIDEO),
)
