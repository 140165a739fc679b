"""Tiny models with random weights, of the classes that people run."""

from __future__ import annotations

import torch
from torch import nn


def llama(tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
            max_position_embeddings=64, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def t5(encoder_only: bool = True) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=36, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=64)
    return (T5EncoderModel if encoder_only else T5ForConditionalGeneration)(config).eval()


def clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=36, num_attention_heads=4, num_hidden_layers=3, vocab_size=64, projection_dim=32)
    ).eval()


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    return AlbertModel(
        AlbertConfig(
            vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=36,
            num_hidden_groups=1,
        )
    ).eval()  # fmt: skip


def flux_transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def flux_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "guidance": torch.tensor([3.5]),
    }  # fmt: skip


def sdxl_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=32, norm_num_groups=4, transformer_layers_per_block=(1, 2),
    ).eval()  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
