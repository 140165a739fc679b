"""Tiny diffusers pipelines with random weights, by name, and a run of each: text encoders on token ids, then the pipeline on their output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as df
import torch
import transformers as tf

TOKENS = torch.tensor([[5, 17, 42, 3, 88, 61, 20, 9, 31, 77, 12, 2]])
NEGATIVE = torch.zeros_like(TOKENS)
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


def _flux() -> Any:
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


def _stable_diffusion() -> Any:
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


def _controlnet() -> Any:
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


def _sdxl() -> Any:
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


def _sd3() -> Any:
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


def _pixart() -> Any:
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


def _sana() -> Any:
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


def _wan() -> Any:
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


def _ltx() -> Any:
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


def _common() -> dict[str, Any]:
    return {"num_inference_steps": 2, "generator": torch.Generator("cpu").manual_seed(3), "output_type": "pt"}


def _run_flux(pipe: Any) -> Any:
    pooled, embeds = pipe.text_encoder(TOKENS).pooler_output, pipe.text_encoder_2(TOKENS)[0]
    return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=16, width=16, **_common()).images


def _run_stable_diffusion(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, height=32, width=32, **_common()).images


def _run_controlnet(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    torch.manual_seed(4)
    image = torch.rand(1, 3, 32, 32)
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, image=image, **_common()).images


def _run_sdxl(pipe: Any) -> Any:
    def encode(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = pipe.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], dim=-1), second[0]

    embeds, pooled = encode(TOKENS)
    negative, negative_pooled = encode(NEGATIVE)
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        height=32,
        width=32,
        **_common(),
    ).images


def _run_sd3(pipe: Any) -> Any:
    pooled = torch.cat([pipe.text_encoder(TOKENS)[0], pipe.text_encoder_2(TOKENS)[0]], dim=-1)
    embeds = pipe.text_encoder_3(TOKENS)[0]
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=-embeds,
        negative_pooled_prompt_embeds=-pooled,
        height=32,
        width=32,
        **_common(),
    ).images


def _run_masked(pipe: Any) -> Any:
    embeds, negative, mask = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0], torch.ones_like(TOKENS)
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        use_resolution_binning=False,
        **_common(),
    ).images


def _run_wan(pipe: Any) -> Any:
    embeds, negative = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0]
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, height=16, width=16, num_frames=5, **_common()).frames


def _run_ltx(pipe: Any) -> Any:
    embeds, negative, mask = pipe.text_encoder(TOKENS)[0], pipe.text_encoder(NEGATIVE)[0], torch.ones_like(TOKENS)
    return pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        height=32,
        width=32,
        num_frames=9,
        **_common(),
    ).frames


@dataclass(frozen=True)
class Family:
    """One pipeline: how to make it and how to run it."""

    make: Callable[[], Any]
    run: Callable[[Any], Any]


FAMILIES: dict[str, Family] = {
    "flux": Family(_flux, _run_flux),
    "stable_diffusion": Family(_stable_diffusion, _run_stable_diffusion),
    "controlnet": Family(_controlnet, _run_controlnet),
    "sdxl": Family(_sdxl, _run_sdxl),
    "sd3": Family(_sd3, _run_sd3),
    "pixart": Family(_pixart, _run_masked),
    "sana": Family(_sana, _run_masked),
    "wan": Family(_wan, _run_wan),
    "ltx": Family(_ltx, _run_ltx),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of this family in this dtype; every weight has a value that nothing else has."""
    torch.manual_seed(11)
    pipe = FAMILIES[name].make()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
            module.eval().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any) -> Any:
    """The family's own run; two steps with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return FAMILIES[name].run(pipe)


def without_tokenizers(name: str) -> dict[str, None]:
    """What ``from_pretrained`` must be given, because the tiny pipelines have no tokenizers."""
    absent: dict[str, dict[str, None]] = {
        "flux": {"tokenizer": None, "tokenizer_2": None},
        "sdxl": {"tokenizer": None, "tokenizer_2": None},
        "sd3": {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": None},
        "stable_diffusion": {"tokenizer": None, "safety_checker": None, "feature_extractor": None},
        "controlnet": {"tokenizer": None, "safety_checker": None, "feature_extractor": None},
    }
    return absent.get(name, {"tokenizer": None})
