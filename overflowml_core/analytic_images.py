"""Passes of diffusion transformers, UNets and VAE decoders by arithmetic, for models whose code is not there or cannot be traced.

Knows nothing of files and of torch. Operations are counted as in ``analytic``: a multiply-add is two, attention is a kind of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.activations import (
    ASSUMED_PIXELS,
    ASSUMED_TEXT_TOKENS,
    decoder_bytes,
    diffusion_transformer_bytes,
    first_int,
    unet_bytes,
)
from overflowml_core.facts import Block, Workload
from overflowml_core.work import BlockWork, PassProfile, Work

ASSUMED_STEPS = 28
"""Denoising steps where the workload names none: the default of FLUX.1-dev's pipeline (diffusers 0.42)."""

CLIP_TOKENS = 77
"""Tokens of a prompt of Stable Diffusion 1 to XL: the length to which CLIP pads."""

_MEMORY_VECTORS = 126
"""Vectors of the model's width that a block of a diffusion transformer moves outside its products, for each token: norms, modulation,
rotary embedding in float32, gates, activation. Counted in diffusers 0.42's FluxTransformerBlock (128) and FluxSingleTransformerBlock
(123)."""

_MATMUL_VECTORS = 18
"""The same for what products read and write beside weights (FluxTransformerBlock 18, FluxSingleTransformerBlock 17)."""

_PEAK_VECTORS = 16
"""Vectors that a block holds at its peak beyond its inputs (FluxSingleTransformerBlock: 432 MiB over vectors of 27 MiB)."""

_MEMORY_CALLS, _MATMUL_CALLS = 60, 10
"""Operations of a block that move bytes, and products: between the 79 and 14 of FLUX's double block and the 42 and 6 of its single one."""

_CONV_TRAFFIC = 2.45
"""Bytes that group norms, activations and sums move over what convolutions read and write: AutoencoderKL of FLUX.1 decoding 1024 x 1024,
traced."""

_LINEAR_TRAFFIC = 1.55
"""The same over what linear layers of a UNet read and write: SDXL 21.3 GB in all and SD 1.5 1.57 GB, traced; the rule gives 21.3 and
1.63."""


@dataclass(frozen=True, slots=True)
class DiffusionLayer:
    """A block of a diffusion transformer.

    Attributes:
        image_count: elements of the matrices that each image token is multiplied with.
        text_count: the same for each text token.
        weight_bytes: bytes of all weights of the block, modulation included.
        attention_width: features of a query over all heads; 0 without attention.
        joint: text and image tokens attend to each other; else image tokens to themselves.
        cross: image tokens attend to the text in an attention of its own.
    """

    image_count: int
    text_count: int
    weight_bytes: int
    attention_width: int
    joint: bool = False
    cross: bool = False


@dataclass(frozen=True, slots=True)
class DiffusionShape:
    """A diffusion transformer, as far as arithmetic needs it.

    Attributes:
        layers: one for each block, in order.
        width: features of a token.
        pixels_per_token: edge of what a token covers in pixels (VAE times patch).
        frames_per_token: frames that a token covers after the first.
        text_tokens: tokens of the prompt.
        guided: classifier-free guidance doubles the batch.
        outside_count, outside_bytes: elements and bytes of the weights outside the blocks.
        dtype: in which it computes, as safetensors spells it.
        element_bytes: of this dtype.
    """

    layers: tuple[DiffusionLayer, ...]
    width: int
    pixels_per_token: int = 16
    frames_per_token: int = 4
    text_tokens: int = ASSUMED_TEXT_TOKENS
    guided: bool = False
    outside_count: int = 0
    outside_bytes: int = 0
    dtype: str = "BF16"
    element_bytes: int = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Convolutions and linear layers of a UNet or a VAE that run at one resolution.

    Attributes:
        scale: positions of its maps over positions of the latents (4 is twice the edge, 1/4 half of it).
        conv_count: elements of its kernels.
        linear_count: elements of matrices that each position is multiplied with.
        text_count: elements of matrices that each text token is multiplied with.
        conv_features: channels in and out of its convolutions, summed.
        linear_features: features in and out of its linear layers, summed.
        query_features: features of queries over all layers of attention of positions to each other.
        cross_features: the same for attention to the text.
        weight_bytes: bytes of its weights.
        calls: its convolutions and linear layers.
    """

    scale: float = 1.0
    conv_count: int = 0
    linear_count: int = 0
    text_count: int = 0
    conv_features: int = 0
    linear_features: int = 0
    query_features: int = 0
    cross_features: int = 0
    weight_bytes: int = 0
    calls: int = 1


@dataclass(frozen=True, slots=True)
class ConvShape:
    """A UNet or the decoder of a VAE.

    Attributes:
        blocks: parts of each block, in order; none for a block that the pass leaves out.
        outside: parts outside the blocks.
        channels: of the maps at the latents' resolution (UNet), or of the last stage (decoder).
        text_tokens: tokens of the prompt.
        dtype: in which it computes.
        element_bytes: of this dtype.
    """

    blocks: tuple[tuple[Part, ...], ...]
    outside: tuple[Part, ...] = ()
    channels: int = 128
    text_tokens: int = CLIP_TOKENS
    dtype: str = "BF16"
    element_bytes: int = 2


def image_tokens(workload: Workload, pixels_per_token: int = 16, frames_per_token: int = 4) -> int:
    """Tokens of one image or clip; 1024 x 1024 pixels where the workload names none."""
    height, width, frames = workload.height or ASSUMED_PIXELS, workload.width or ASSUMED_PIXELS, workload.frames or 1
    later = -(-(frames - 1) // frames_per_token)
    return -(-height // pixels_per_token) * -(-width // pixels_per_token) * (1 + later)


def diffusion_profiles(shape: DiffusionShape, workload: Workload, note: str = "") -> tuple[PassProfile, ...]:
    """The denoising pass ("denoise") of a diffusion transformer, as often as the workload has steps.

    Args:
        shape: the model.
        workload: pixels, frames, batch and steps.
        note: why this was not traced.
    """
    images = image_tokens(workload, shape.pixels_per_token, shape.frames_per_token)
    batch = workload.batch * (2 if shape.guided else 1)
    made: dict[DiffusionLayer, BlockWork] = {}  # thousands of equal blocks share one object
    for layer in shape.layers:
        if layer not in made:
            made[layer] = _transformer_work(layer, shape, images, batch)
    tokens = images + shape.text_tokens
    moved = 2 * tokens * batch * shape.width * shape.element_bytes
    outside = Work("matmul", shape.dtype, 2 * shape.outside_count * images * batch, moved + shape.outside_bytes, shape.outside_bytes, 4)
    per_token = diffusion_transformer_bytes(shape.width, Workload(height=16, width=16), shape.element_bytes, guided=False)
    live = per_token * tokens * batch // (1 + ASSUMED_TEXT_TOKENS)
    blocks = tuple(made[layer] for layer in shape.layers)
    return (PassProfile("denoise", workload.steps or ASSUMED_STEPS, live, blocks, (outside,), 0, "analytic", note),)


def diffusion_shape(config: object, blocks: Sequence[Block], element_bytes: int, guided: bool) -> DiffusionShape:
    """A diffusers transformer's shape by its config and its blocks, where its code cannot be traced.

    Of each block, a token passes 12 squares of the width at most: four of attention, eight of feed-forward. What a block has beyond that
    is another stream's or makes modulation (FluxTransformerBlock 36, QwenImageTransformerBlock 36, FluxSingleTransformerBlock 15).

    Args:
        config: of a diffusers model.
        blocks: of the component, in order.
        element_bytes: of the computation's dtype.
        guided: whether the pipeline doubles the batch.
    """
    heads = first_int(config, "num_attention_heads", "num_heads", default=0)
    width = heads * first_int(config, "attention_head_dim", "head_dim", default=0)
    width = width or first_int(config, "hidden_size", "dim", "inner_dim", default=1024)
    cross = first_int(config, "cross_attention_dim", default=0) > 0
    layers = []
    for block in blocks:
        each = min(block.linear_count or block.weight_count, 12 * width**2)
        layers.append(DiffusionLayer(each, 0 if cross else each, block.stored_bytes, width, joint=not cross, cross=cross))
    return DiffusionShape(tuple(layers), width, guided=guided, dtype="F32" if element_bytes == 4 else "BF16", element_bytes=element_bytes)


def _transformer_work(layer: DiffusionLayer, shape: DiffusionShape, images: int, batch: int) -> BlockWork:
    tokens = images + (shape.text_tokens if layer.text_count or layer.joint else 0)
    vector = shape.width * shape.element_bytes * batch
    flop = 2 * batch * (images * layer.image_count + shape.text_tokens * layer.text_count)
    moved = _MATMUL_VECTORS * tokens * vector + layer.weight_bytes
    works = [Work("matmul", shape.dtype, flop, moved, layer.weight_bytes, _MATMUL_CALLS)]
    if layer.attention_width:
        seen = images + (shape.text_tokens if layer.joint else 0)
        flop = 4 * batch * seen * seen * layer.attention_width
        works.append(Work("attention", shape.dtype, flop, 4 * seen * layer.attention_width * shape.element_bytes * batch))
    if layer.cross:
        flop = 4 * batch * images * shape.text_tokens * layer.attention_width
        moved = 2 * (images + shape.text_tokens) * layer.attention_width * shape.element_bytes * batch
        works.append(Work("attention", shape.dtype, flop, moved))
    works.append(Work("memory", shape.dtype, 0, _MEMORY_VECTORS * tokens * vector, 0, _MEMORY_CALLS))
    return BlockWork(tuple(works), _PEAK_VECTORS * tokens * vector)


def unet_profiles(shape: ConvShape, workload: Workload, note: str = "") -> tuple[PassProfile, ...]:
    """The denoising pass of a UNet on latents of an eighth of the pixels' edge, batch doubled by guidance."""
    live = unet_bytes(shape.channels, workload, shape.element_bytes)
    return (_conv_profile("denoise", workload.steps or ASSUMED_STEPS, shape, workload, 2 * workload.batch, live, note),)


def decoder_profile(shape: ConvShape, workload: Workload, note: str = "") -> PassProfile:
    """The decoding pass of a VAE, which happens once; each frame of a clip counts as an image."""
    live = decoder_bytes(shape.channels, workload, shape.element_bytes)
    return _conv_profile("decode", 1, shape, workload, workload.batch * (workload.frames or 1), live, note)


def decoder_shape(channels: Sequence[int], block_count: int, element_bytes: int, resnets: int = 3, latent_channels: int = 16) -> ConvShape:
    """The decoder of diffusers' AutoencoderKL by its config; all of its work counts as outside the blocks, since their names do not tell.

    Args:
        channels: ``block_out_channels``, finest stage first.
        block_count: blocks of the component.
        element_bytes: of the computation's dtype.
        resnets: in each stage, ``layers_per_block + 1``.
        latent_channels: of the latents.
    """
    deepest = channels[-1]
    parts = [_conv(1.0, 9, [(latent_channels, deepest), *[(deepest, deepest)] * 4], element_bytes)]
    parts.append(
        Part(linear_count=4 * deepest**2, linear_features=8 * deepest, query_features=deepest, weight_bytes=4 * deepest**2 * element_bytes)
    )
    before = deepest
    for level, width in enumerate(reversed(channels)):
        scale = 4.0**level
        parts.append(_conv(scale, 9, [(before, width), *[(width, width)] * (2 * resnets - 1)], element_bytes))
        if before != width:
            parts.append(_conv(scale, 1, [(before, width)], element_bytes))
        if level + 1 < len(channels):
            parts.append(_conv(4 * scale, 9, [(width, width)], element_bytes))
        before = width
    parts.append(_conv(4.0 ** (len(channels) - 1), 9, [(before, 3)], element_bytes))
    dtype = "F32" if element_bytes == 4 else "BF16"
    return ConvShape(((),) * block_count, tuple(parts), int(channels[0]), dtype=dtype, element_bytes=element_bytes)


def _conv(scale: float, kernel: int, pairs: Sequence[tuple[int, int]], element_bytes: int) -> Part:
    count = sum(kernel * into * out for into, out in pairs)
    features = sum(into + out for into, out in pairs)
    return Part(scale, conv_count=count, conv_features=features, weight_bytes=count * element_bytes, calls=len(pairs))


def _conv_profile(name: str, count: int, shape: ConvShape, workload: Workload, batch: int, live: int, note: str) -> PassProfile:
    pixels = -(-(workload.height or ASSUMED_PIXELS) // 8) * -(-(workload.width or ASSUMED_PIXELS) // 8)
    blocks = tuple(_conv_block(parts, shape, pixels, batch) for parts in shape.blocks)
    outside = tuple(work for part in shape.outside for work in _part_works(part, shape, pixels, batch))
    return PassProfile(name, count, live, blocks, outside, 0, "analytic", note)


def _conv_block(parts: tuple[Part, ...], shape: ConvShape, pixels: int, batch: int) -> BlockWork:
    works = tuple(work for part in parts for work in _part_works(part, shape, pixels, batch))
    widest = max((part.scale * (part.conv_features + part.linear_features) / max(part.calls, 1) for part in parts), default=0.0)
    # two maps in and out of an operation, and the one that the residual sum waits for
    return BlockWork(works, round(2 * widest * pixels * batch * shape.element_bytes), 1 if parts else 0)


def _part_works(part: Part, shape: ConvShape, pixels: int, batch: int) -> list[Work]:
    positions = max(round(pixels * part.scale), 1)
    rows, texts = positions * batch, shape.text_tokens * batch
    weights = part.conv_count + part.linear_count + part.text_count
    conv_bytes = round(part.weight_bytes * part.conv_count / weights) if weights else 0
    works: list[Work] = []
    memory = 0.0
    if part.conv_count:
        moved = part.conv_features * rows * shape.element_bytes
        memory += _CONV_TRAFFIC * moved
        works.append(Work("conv", shape.dtype, 2 * part.conv_count * rows, moved + conv_bytes, conv_bytes, part.calls))
    if part.linear_count or part.text_count:
        moved, read = part.linear_features * rows * shape.element_bytes, part.weight_bytes - conv_bytes
        memory += _LINEAR_TRAFFIC * moved
        flop = 2 * (part.linear_count * rows + part.text_count * texts)
        works.append(Work("matmul", shape.dtype, flop, moved + read, read, part.calls))
    for features, seen in ((part.query_features, positions), (part.cross_features, shape.text_tokens)):
        if features:
            moved = 2 * (positions + seen) * features * shape.element_bytes * batch
            works.append(Work("attention", shape.dtype, 4 * batch * positions * seen * features, moved))
    if memory:
        works.append(Work("memory", shape.dtype, 0, round(memory), 0, 3 * part.calls))
    return works
