"""Builds the tiny pipelines: every component from a config, with random weights, and no tokenizers."""

from __future__ import annotations

from typing import Any

import diffusers as df
import transformers as tf

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "max_position_embeddings": 77,
    "projection_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 100}


def _clip(projected: bool = False, **changes: Any) -> Any:
    config = tf.CLIPTextConfig(**{**_CLIP, **changes})
    return tf.CLIPTextModelWithProjection(config) if projected else tf.CLIPTextModel(config)


def _t5() -> Any:
    return tf.T5EncoderModel(tf.T5Config(**_T5))


def _vae(latent_channels: int = 4, **changes: Any) -> Any:
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "sample_size": 32,
    }
    return df.AutoencoderKL(**{**config, **changes})


def unattended_vae() -> Any:
    """A VAE without attention, whose views of batches the virtual accelerator does not know."""
    return _vae(mid_block_add_attention=False).eval()


def unet(**changes: Any) -> Any:
    """A UNet as Stable Diffusion 1.5 has it."""
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    }
    return df.UNet2DConditionModel(**{**config, **changes})


def flux() -> Any:
    """FLUX."""
    return df.FluxPipeline(
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(),
        tokenizer=None,
        text_encoder_2=_t5(),
        tokenizer_2=None,
        transformer=df.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        ),
        vae=_vae(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
    )


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5 without a safety checker."""
    return df.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=None,
        unet=unet(),
        scheduler=df.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def controlnet() -> Any:
    """The same with a ControlNet."""
    control = df.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 16),
    )
    return df.StableDiffusionControlNetPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=None,
        unet=unet(),
        controlnet=control,
        scheduler=df.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Stable Diffusion XL."""
    return df.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
        scheduler=df.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3() -> Any:
    """Stable Diffusion 3."""
    return df.StableDiffusion3Pipeline(
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(projected=True),
        text_encoder_2=_clip(projected=True),
        text_encoder_3=_t5(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        transformer=df.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
    )


def pixart() -> Any:
    """PixArt-alpha."""
    return df.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=_t5(),
        vae=_vae(),
        transformer=df.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            use_additional_conditions=False,
        ),
        scheduler=df.DDIMScheduler(),
    )


def sana() -> Any:
    """Sana."""
    gemma = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
    }
    return df.SanaPipeline(
        tokenizer=None,
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**gemma, bos_token_id=0, eos_token_id=2, pad_token_id=0)),
        vae=df.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=df.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
    )


def wan() -> Any:
    """Wan, a video model."""
    return df.WanPipeline(
        tokenizer=None,
        text_encoder=tf.UMT5EncoderModel(tf.UMT5Config(**_T5)),
        transformer=df.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        vae=df.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def ltx() -> Any:
    """LTX, a video model."""
    return df.LTXPipeline(
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        vae=df.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            upsample_residual=(False, False, False, False),
            upsample_factor=(1, 1, 1, 1),
            timestep_conditioning=False,
            encoder_causal=True,
            decoder_causal=False,
        ),
        text_encoder=_t5(),
        tokenizer=None,
        transformer=df.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )
