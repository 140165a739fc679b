"""A pipeline folder of Stable Diffusion's own classes, small enough that a picture takes milliseconds, with tokenizers for any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZE = 32
"""Pixels of a side of its pictures."""


def write_pipeline(folder: Path, width: int = 8) -> Path:
    """Save it with seeded random weights.

    Args:
        folder: is made.
        width: channels of the narrowest layers.
    """
    import diffusers as df

    torch.manual_seed(5)
    pipe = df.StableDiffusionPipeline(
        vae=df.AutoencoderKL(
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=SIZE,
        ),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        unet=df.UNet2DConditionModel(
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            sample_size=SIZE // 2,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=4,
        ),
        scheduler=df.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _text_encoder() -> Any:
    import transformers as tf

    config = tf.CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return tf.CLIPTextModel(config)


def _tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    # Every byte, alone and at the end of a word: any text can be written, letter by letter.
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
