"""Analytic estimates of activations, for plans that are made before anybody has run or traced the model. Pure arithmetic over configs.

They are marked "analytic" in every plan. The factors come from runs of the same models under fake tensors (live storages,
parameters excluded), which the docstrings name.
"""

from __future__ import annotations

from overflowml_core.facts import Workload

ASSUMED_TOKENS = 1024
"""Tokens of a prompt where the workload names none."""

ASSUMED_TEXT_TOKENS = 512
"""Tokens of an image prompt: the length to which FLUX and SD3 pad for T5."""

ASSUMED_PIXELS = 1024
"""Height and width of an image where the workload names none."""

_BLOCK_VECTORS = 18
"""Token vectors that a diffusion transformer holds at its peak: FLUX.1-dev at 1024x1024, 468 MiB over vectors of 27 MiB."""

_DECODER_MAPS = 6
"""Full-size maps of the last stage's width that a VAE decoder holds at its peak: AutoencoderKL at 1024x1024, 1537 MiB over
maps of 256 MiB."""

_UNET_MAPS = 28
"""Maps of the first stage's width that a UNet holds at its peak, skip connections included: SDXL at 1024x1024 with a batch of two, 315 MiB
over maps of 20 MiB (16); Stable Diffusion 1.5 at 512x512, 65 MiB over maps of 2.5 MiB (26)."""


def language_model_bytes(config: object, workload: Workload, element_bytes: int, generates: bool) -> int:
    """One forward pass of a transformer over tokens: residual stream and projections (8 hidden vectors a token), feed-forward (3
    intermediates), keys and values of all layers, and logits for one position a sequence. Llama-3.1-70B at 2048 tokens traced: 1173 MiB.

    Args:
        config: of a transformers model; composite ones are asked for their text part.
        workload: tokens and batch.
        element_bytes: of the computation's dtype.
        generates: whether there are a cache and logits.

    Returns:
        Bytes.
    """
    text = _text_config(config)
    hidden = first_int(text, "hidden_size", "d_model", "n_embd", default=1024)
    layers = first_int(text, "num_hidden_layers", "num_layers", "n_layer", default=24)
    heads = first_int(text, "num_attention_heads", "num_heads", "n_head", default=16)
    kv_heads = first_int(text, "num_key_value_heads", default=heads)
    head_size = first_int(text, "head_dim", "d_kv", default=max(hidden // max(heads, 1), 1))
    intermediate = first_int(text, "intermediate_size", "d_ff", "n_inner", default=4 * hidden)
    tokens = (workload.prompt_tokens or (ASSUMED_TOKENS if generates else ASSUMED_TEXT_TOKENS)) * workload.batch
    total = (8 * hidden + 3 * intermediate) * tokens * element_bytes
    if generates:
        context = tokens + (workload.new_tokens or 0) * workload.batch
        total += 2 * kv_heads * head_size * layers * element_bytes * context
        total += first_int(text, "vocab_size", default=0) * 4 * workload.batch
    return total


def diffusion_transformer_bytes(width: int, workload: Workload, element_bytes: int, guided: bool) -> int:
    """One denoising pass of a diffusion transformer of this width (features of a token) on latents of a sixteenth of the pixels' edge.

    Args:
        width: features of a token.
        workload: pixels, frames, batch.
        element_bytes: of the computation's dtype.
        guided: whether classifier-free guidance doubles the batch.
    """
    height, breadth = workload.height or ASSUMED_PIXELS, workload.width or ASSUMED_PIXELS
    frames = (workload.frames or 1) // 4 + 1 if (workload.frames or 1) > 1 else 1
    tokens = -(-height // 16) * -(-breadth // 16) * frames + ASSUMED_TEXT_TOKENS
    return tokens * width * element_bytes * _BLOCK_VECTORS * workload.batch * (2 if guided else 1)


def unet_bytes(first_channels: int, workload: Workload, element_bytes: int) -> int:
    """One denoising pass of a UNet, batch doubled by guidance, on latents of an eighth of the pixels' edge."""
    pixels = (workload.height or ASSUMED_PIXELS) * (workload.width or ASSUMED_PIXELS) // 64
    return pixels * first_channels * element_bytes * _UNET_MAPS * workload.batch * 2


def decoder_bytes(first_channels: int, workload: Workload, element_bytes: int) -> int:
    """Decoding one image or clip with a VAE whose last stage has this many channels."""
    pixels = (workload.height or ASSUMED_PIXELS) * (workload.width or ASSUMED_PIXELS)
    return pixels * first_channels * element_bytes * _DECODER_MAPS * min(workload.frames or 1, 4) * workload.batch


def first_int(config: object, *names: str, default: int) -> int:
    """The first of these attributes (or items) that is a positive whole number."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def _text_config(config: object) -> object:
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config
