"""A FLUX pipeline folder of the real classes with seeded random weights, written component by component.

Smaller than FLUX.1 in width and depth, the same in structure: double and single blocks, a T5 and a CLIP encoder, a VAE with 16
latent channels. Weights are normal with a deviation of 0.02 and norms are one, so that activations stay finite. At no time
is more than one component in memory. Imports torch inside functions only.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.cases import Report

_SEED = 20
_WEIGHT_STD = 0.02
_HEAD_COUNT = 8
_HEAD_SIZE = 128
_DOUBLE_BLOCKS = 8
_SINGLE_BLOCKS = 20
_T5_WIDTH = 1024
_T5_LAYERS = 12
_CLIP_WIDTH = 256
_SHARD_SIZE = "700MB"  # more than one file, as large models have it


def write_pipeline(folder: Path, report: Report) -> None:
    """Write a folder that ``FluxPipeline.from_pretrained`` loads.

    Args:
        folder: an empty folder.
        report: is told of each component.
    """
    writers: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("scheduler", _write_scheduler),
        ("tokenizer", _write_clip_tokenizer),
        ("tokenizer_2", _write_t5_tokenizer),
        ("text_encoder", _write_clip),
        ("text_encoder_2", _write_t5),
        ("vae", _write_vae),
        ("transformer", _write_transformer),
    )
    for done, (name, write) in enumerate(writers):
        report(f"writing {name}", done, len(writers))
        write(folder / name)
    _write_index(folder)
    report("writing", len(writers), len(writers))


def _write_index(folder: Path) -> None:
    import diffusers

    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_scheduler(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder)


def _write_clip_tokenizer(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    # Every byte, alone and at the end of a word: any text can be written, letter by letter.
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77).save_pretrained(folder)


def _write_t5_tokenizer(folder: Path) -> None:
    from transformers import T5TokenizerFast

    # The order of T5's own vocabulary: padding, end, unknown, pieces, then the sentinels backwards.
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("\u2581", -2.0), *((letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation)]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    T5TokenizerFast(vocab=special + pieces + sentinels, model_max_length=512).save_pretrained(folder)


def _write_clip(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=_CLIP_WIDTH,
        intermediate_size=4 * _CLIP_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=_CLIP_WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    _save(lambda: CLIPTextModel(config), folder)


def _write_t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=256,
        d_model=_T5_WIDTH,
        d_kv=64,
        d_ff=2816,
        num_layers=_T5_LAYERS,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    _save(lambda: T5EncoderModel(config), folder)


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    def make() -> Any:
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(64, 128, 256, 256),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            sample_size=256,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    _save(make, folder)


def _write_transformer(folder: Path) -> None:
    from diffusers import FluxTransformer2DModel

    def make() -> Any:
        return FluxTransformer2DModel(
            in_channels=64,
            num_layers=_DOUBLE_BLOCKS,
            num_single_layers=_SINGLE_BLOCKS,
            attention_head_dim=_HEAD_SIZE,
            num_attention_heads=_HEAD_COUNT,
            joint_attention_dim=_T5_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH,
            guidance_embeds=True,
        )

    _save(make, folder)


def _save(make: Callable[[], Any], folder: Path) -> None:
    import torch

    # On "meta" no initialization runs and no memory is taken; only then the real tensors are made, once.
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
    model.to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=_WEIGHT_STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
