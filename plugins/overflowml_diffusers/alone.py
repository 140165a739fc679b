"""What a model is called with when it stands alone, without the pipeline that knows its inputs: shapes from its config and the workload."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from overflowml_core.activations import ASSUMED_PIXELS, ASSUMED_TEXT_TOKENS, first_int
from overflowml_core.errors import Unsupported
from overflowml_core.facts import Workload
from overflowml_diffusers.vae import is_vae

ASSUMED_FRAMES = 81
"""Frames of a clip where the workload names none: five seconds of Wan."""

_LATENT_FACTOR = 8
"""Pixels of a latent's edge in the VAEs of nearly all families."""

_CLIP_TOKENS = 77
_TEXT_WIDTHS = ("joint_attention_dim", "text_dim", "caption_channels", "text_embed_dim", "cross_attention_dim", "encoder_hid_dim")
_ONE_CALL_EACH = ("Wan", "QwenImage", "Chroma")
"""Beginnings of classes whose pipelines call them once with the prompt and once without, in place of a doubled batch."""


def arguments_of(module: nn.Module, workload: Workload) -> dict[str, Any]:
    """Keyword arguments for one call of a model: of ``decode`` for a VAE, of ``forward`` for every other one.

    Args:
        module: inside a trace.
        workload: sizes; what is open is assumed.

    Raises:
        Unsupported: nobody knows what it is called with.
    """
    config = getattr(module, "config", None)
    if is_vae(module):
        return _latents_to_decode(module, config, workload)
    wanted = inspect.signature(type(module).forward).parameters
    if "input_ids" in wanted:
        tokens = min(
            first_int(config, "max_position_embeddings", default=ASSUMED_TEXT_TOKENS), workload.prompt_tokens or ASSUMED_TEXT_TOKENS
        )
        return {"input_ids": torch.zeros(workload.batch, tokens, dtype=torch.long)}
    if "pixel_values" in wanted:
        side = first_int(config, "image_size", default=224)
        return {"pixel_values": _zeros(module, workload.batch, first_int(config, "num_channels", default=3), side, side)}
    if "hidden_states" in wanted or "sample" in wanted:
        return _to_denoise(module, config, wanted, workload)
    raise Unsupported(f"{type(module).__name__}: nobody knows what it is called with; describe the pipeline that it belongs to")


def _zeros(module: nn.Module, *shape: int) -> torch.Tensor:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(*shape, dtype=dtype)


def _pixels(workload: Workload) -> tuple[int, int]:
    return workload.height or ASSUMED_PIXELS, workload.width or ASSUMED_PIXELS


def _latents_to_decode(module: Any, config: Any, workload: Workload) -> dict[str, Any]:
    channels = first_int(config, "latent_channels", "z_dim", default=4)
    stages = getattr(config, "block_out_channels", None) or getattr(config, "decoder_block_out_channels", None) or ()
    factor = first_int(module, "spatial_compression_ratio", default=2 ** (len(stages) - 1) if stages else _LATENT_FACTOR)
    height, width = _pixels(workload)
    shape = [workload.batch, channels]
    if any(parameter.dim() == 5 for parameter in module.parameters()):
        interval = first_int(config, "temporal_compression_ratio", "scale_factor_temporal", default=4)
        frames = workload.frames or (1 if "Image" in type(module).__name__ else ASSUMED_FRAMES)
        shape.append((frames - 1) // interval + 1)
    latents = _zeros(module, *shape, height // factor, width // factor)
    first = next(name for name in inspect.signature(type(module).decode).parameters if name != "self")
    return {first: latents, "return_dict": False}


def _to_denoise(module: Any, config: Any, wanted: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    kind = type(module).__name__
    doubled = not getattr(config, "guidance_embeds", False) and not kind.startswith(_ONE_CALL_EACH)
    batch = workload.batch * (2 if doubled else 1)
    rows, columns = (pixels // _LATENT_FACTOR for pixels in _pixels(workload))
    packed = "img_ids" in wanted or "img_shapes" in wanted
    tokens = _CLIP_TOKENS if "UNet" in kind or "ControlNet" in kind else workload.prompt_tokens or ASSUMED_TEXT_TOKENS
    channels = first_int(config, "in_channels", default=4)
    if {"num_frames", "height", "width"} <= set(wanted):
        return _to_denoise_packed_video(module, config, batch, channels, tokens, workload)
    main = "hidden_states" if "hidden_states" in wanted else "sample"
    shape = (batch, (rows // 2) * (columns // 2), channels) if packed else _maps(kind, config, batch, channels, rows, columns, workload)
    widths = [width for name in _TEXT_WIDTHS if isinstance(width := getattr(config, name, None), int)]
    stages = getattr(config, "conditioning_embedding_out_channels", None) or (0,) * 4  # each but the first halves the picture
    picture = (rows * 2 ** (len(stages) - 1), columns * 2 ** (len(stages) - 1))
    values: dict[str, Any] = {
        main: _zeros(module, *shape),
        "timestep": torch.zeros(batch) if packed else torch.zeros(batch, dtype=torch.long),
        "guidance": torch.zeros(batch) if getattr(config, "guidance_embeds", False) else None,
        "pooled_projections": _zeros(module, batch, first_int(config, "pooled_projection_dim", default=768)),
        "encoder_hidden_states": _zeros(module, batch, tokens, widths[0]) if widths else None,
        "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        "encoder_hidden_states_mask": torch.ones(batch, tokens, dtype=torch.long),
        "img_ids": torch.zeros((rows // 2) * (columns // 2), 3),
        "txt_ids": torch.zeros(tokens, 3),
        "img_shapes": [[(1, rows // 2, columns // 2)]] * batch,
        "controlnet_cond": _zeros(module, batch, first_int(config, "conditioning_channels", default=3), *picture),
        "added_cond_kwargs": _conditions(module, config, batch),
        "return_dict": False,
    }
    return {name: value for name, value in values.items() if name in wanted and value is not None}


def _to_denoise_packed_video(module: Any, config: Any, batch: int, channels: int, tokens: int, workload: Workload) -> dict[str, Any]:
    """As LTX has it: a token is 32x32 pixels of 8 frames."""
    height, width = (max(pixels // 32, 1) for pixels in _pixels(workload))
    frames = ((workload.frames or ASSUMED_FRAMES) - 1) // 8 + 1
    return {
        "hidden_states": _zeros(module, batch, frames * height * width, channels),
        "encoder_hidden_states": _zeros(module, batch, tokens, first_int(config, "caption_channels", default=4096)),
        "timestep": torch.zeros(batch),
        "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def _maps(kind: str, config: Any, batch: int, channels: int, rows: int, columns: int, workload: Workload) -> tuple[int, ...]:
    patch = getattr(config, "patch_size", None)
    if not (isinstance(patch, (list, tuple)) and len(patch) == 3) and "3D" not in kind:
        return batch, channels, rows, columns
    frames = ((workload.frames or ASSUMED_FRAMES) - 1) // 4 + 1
    return (batch, frames, channels, rows, columns) if kind.startswith("CogVideoX") else (batch, channels, frames, rows, columns)


def _conditions(module: nn.Module, config: Any, batch: int) -> dict[str, Any] | None:
    """Sizes and pooled texts as SDXL's UNet and PixArt's transformer take them."""
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = 6
        width = first_int(config, "projection_class_embeddings_input_dim", default=2816)
        pooled = width - ids * first_int(config, "addition_time_embed_dim", default=256)
        return {"text_embeds": _zeros(module, batch, pooled), "time_ids": _zeros(module, batch, ids)}
    return {"resolution": None, "aspect_ratio": None}
