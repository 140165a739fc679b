"""Image and video models by the names and shapes of their tensors: what kind they are, and what their passes compute. Knows nothing of
files.

The names are those of the checkpoints that people pass around (Stable Diffusion, SDXL, SD3, FLUX, HunyuanVideo, Wan, LTX, Qwen-Image,
Lumina) and of diffusers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from overflowml_core.analytic_images import (
    CLIP_TOKENS,
    ConvShape,
    DiffusionLayer,
    DiffusionShape,
    Part,
    decoder_profile,
    diffusion_profiles,
    unet_profiles,
)
from overflowml_core.facts import Component, TensorFact, Workload, digest
from overflowml_core.inspect.ggml_types import PLAIN_TYPES
from overflowml_core.inspect.tensor_groups import ComponentName, TensorGroup, element_count, find_groups, make_block, make_component
from overflowml_core.work import PassProfile, Work


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of image model, by what only its tensors are called.

    Attributes:
        evidence: parts of tensor names that must all occur.
        class_name: diffusers' class for it.
        pixels_per_token, frames_per_token, text_tokens, guided: as in ``DiffusionShape``.
        kind: "transformer", "unet" or "vae".
    """

    evidence: tuple[str, ...]
    class_name: str
    pixels_per_token: int = 16
    frames_per_token: int = 4
    text_tokens: int = 512
    guided: bool = False
    kind: str = "transformer"


FAMILIES = (
    Family(("double_blocks.0.", "individual_token_refiner"), "HunyuanVideoTransformer3DModel", text_tokens=256),
    Family(("double_blocks.0.", "single_blocks.0."), "FluxTransformer2DModel"),
    Family(("context_embedder.token_refiner.", "single_transformer_blocks.0."), "HunyuanVideoTransformer3DModel", text_tokens=256),
    Family(("single_transformer_blocks.0.", "x_embedder"), "FluxTransformer2DModel"),
    Family(("double_stream_blocks.0.",), "HiDreamImageTransformer2DModel", text_tokens=128, guided=True),
    Family(("joint_blocks.0.",), "SD3Transformer2DModel", text_tokens=333, guided=True),
    Family(("transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj"), "SD3Transformer2DModel", text_tokens=333, guided=True),
    Family(("transformer_blocks.0.ff.conv_inverted.",), "SanaTransformer2DModel", 32, text_tokens=300, guided=True),
    Family(("transformer_blocks.0.img_mod",), "QwenImageTransformer2DModel", guided=True),
    Family(("blocks.0.cross_attn.", "patch_embedding"), "WanTransformer3DModel", guided=True),
    Family(("blocks.0.attn2.", "patch_embedding"), "WanTransformer3DModel", guided=True),
    Family(("transformer_blocks.0.attn2.", "patchify_proj"), "LTXVideoTransformer3DModel", 32, 8, 256, True),
    Family(("transformer_blocks.0.attn2.", "proj_in.", "\nscale_shift_table"), "LTXVideoTransformer3DModel", 32, 8, 256, True),
    Family(("noise_refiner.0.",), "Lumina2Transformer2DModel", text_tokens=256, guided=True),
    Family(("input_blocks.0.0.", "middle_block."), "UNet2DConditionModel", guided=True, kind="unet"),
    Family(("down_blocks.0.resnets.", "up_blocks.0.resnets.", "time_embedding."), "UNet2DConditionModel", guided=True, kind="unet"),
    Family(("decoder.conv_in.", "decoder.conv_out."), "AutoencoderKL", kind="vae"),
    Family(("decoder.conv1.", "decoder.head."), "AutoencoderKLWan", kind="vae"),
    Family(("transformer_blocks.0.",), "a diffusion transformer", guided=True),
    Family(("blocks.0.", "patch_embed"), "a diffusion transformer", guided=True),
)
"""In this order. Text lengths and guidance are defaults of diffusers 0.42's pipelines; FLUX.1 and HunyuanVideo have guidance distilled
in."""

_MODULATION = (
    "_mod.",
    "modulation",
    "adaln",
    "adanorm",
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out",
    ".emb_layers.",
    "time_emb_proj",
)
"""Parts of names of matrices that are applied once a sample, not once a token."""

_TEXT_STREAM = ("txt_", "_txt", "context_block.", "_context.", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_CROSS_KEYS = re.compile(r"(cross_attn|attn2|cross_attention)\.(k|v|kv|to_k|to_v|to_kv|k_proj|v_proj|kv_linear)\.")
_CROSS = re.compile(r"(cross_attn|attn2|cross_attention)\.")
_SHRINKS = re.compile(r"(\d+\.0\.op|downsamplers\.0\.conv|downsample\.conv)\.weight")
_GROWS = re.compile(r"(output_blocks\.\d+\.\d+\.conv|upsamplers\.0\.conv(\.conv)?|upsample\.conv|resample\.1)\.weight")
_DEEPEST_DECODER = 3  # a pixel is at most an eighth of a latent's edge


def family_of(tensors: Sequence[TensorFact]) -> Family | None:
    """The first family all of whose evidence occurs; None for other models."""
    text = "".join(f"\n{tensor.name}" for tensor in tensors)
    return next((family for family in FAMILIES if all(part in text for part in family.evidence)), None)


def image_component(name: ComponentName, tensors: Sequence[TensorFact], workload: Workload) -> Component:
    """A component of an image model; without passes where its kind is unknown.

    Args:
        name: what to call it; the class is replaced by the family's where that is known and none was given.
        tensors: all of its tensors, under their names inside the component.
        workload: pixels, frames, batch and steps.
    """
    groups, outside = find_groups(tensors)
    family = family_of(tensors)
    titled = name if name.class_name or family is None else ComponentName(name.name, family.class_name)
    blocks = [make_block(group) for group in groups]
    profiles = () if family is None else _profiles(family, groups, outside, workload)
    return make_component(titled, groups, outside, blocks, profiles)


def _profiles(family: Family, groups: Sequence[TensorGroup], outside: TensorGroup, workload: Workload) -> tuple[PassProfile, ...]:
    note = f"by the shapes of its tensors, taken for {family.class_name}: no code of it was run"
    if family.kind == "transformer":
        found = diffusion_profiles(transformer_shape(family, groups, outside), workload, note)
    elif family.kind == "unet":
        found = unet_profiles(unet_shape(groups, outside), workload, note)
    else:
        found = (decoder_profile(decoder_shape(groups, outside), workload, note),)
    return tuple(_named(profile) for profile in found)


def _named(profile: PassProfile) -> PassProfile:
    """The pass with names for its operations, by their numbers: a host that runs the model may learn what they take."""
    blocks = tuple(replace(block, works=tuple(map(_named_work, block.works))) for block in profile.blocks)
    return replace(profile, blocks=blocks, outside=tuple(map(_named_work, profile.outside)))


def _named_work(work: Work) -> Work:
    numbers = [work.kind, work.dtype, work.flop, work.traffic_bytes, work.weight_bytes, work.calls]
    return replace(work, signature=f"analytic {digest(numbers)}")


def transformer_shape(family: Family, groups: Sequence[TensorGroup], outside: TensorGroup) -> DiffusionShape:
    """A diffusion transformer's shape: which matrices a token of the image or of the text meets, by their names."""
    inputs: Counter[int] = Counter()
    for group in groups:
        inputs.update(tensor.shape[1] for tensor in group.tensors if len(tensor.shape) == 2)
    width = inputs.most_common(1)[0][0] if inputs else 1
    crosses = any(_CROSS.search(tensor.name) for group in groups for tensor in group.tensors)
    layers = tuple(_transformer_layer(group, width, crosses) for group in groups)
    dtype, element_bytes = _computes_in([*groups, outside])
    return DiffusionShape(
        layers=layers,
        width=width,
        pixels_per_token=family.pixels_per_token,
        frames_per_token=family.frames_per_token,
        text_tokens=family.text_tokens,
        guided=family.guided,
        outside_count=0,  # embeddings of pixels, text and time: thousandths of the blocks' work
        outside_bytes=outside.nbytes,
        dtype=dtype,
        element_bytes=element_bytes,
    )


def _transformer_layer(group: TensorGroup, width: int, crosses: bool) -> DiffusionLayer:
    image = text = 0
    own_stream = has_cross = False
    for tensor in group.tensors:
        name = tensor.name.lower()
        if len(tensor.shape) != 2 or any(part in name for part in _MODULATION):
            continue
        count = element_count(tensor.shape)
        if _CROSS_KEYS.search(name):
            text, has_cross = text + count, True
        elif any(part in name for part in _TEXT_STREAM):
            text, own_stream = text + count, True
        else:
            image += count
    joint = not crosses
    if joint and not own_stream:  # one stream for both kinds of tokens
        text = image
    return DiffusionLayer(image, text, group.nbytes, width, joint, has_cross)


def unet_shape(groups: Sequence[TensorGroup], outside: TensorGroup) -> ConvShape:
    """A UNet's shape: the resolution falls and rises with the resampling convolutions, in the order of the blocks."""
    level = deepest = 0
    blocks: list[tuple[Part, ...]] = []
    for group in groups:
        here, change = _split_resampling(group)
        parts = [_part(here, 4.0**level)]
        if change is not None:
            level += 1 if _GROWS.search(change.name) else -1
            deepest = min(deepest, level)
            parts.append(_part([change], 4.0**level))
        blocks.append(tuple(parts))
    channels = next((tensor.shape[0] for group in groups[:1] for tensor in group.tensors if len(tensor.shape) == 4), 320)
    dtype, element_bytes = _computes_in([*groups, outside])
    middle = [tensor for tensor in outside.tensors if tensor.name.startswith("mid_block.")]
    ends = [tensor for tensor in outside.tensors if len(tensor.shape) == 4 and tensor not in middle]
    return ConvShape(tuple(blocks), (_part(ends, 1.0), _part(middle, 4.0**deepest)), channels, CLIP_TOKENS, dtype, element_bytes)


def decoder_shape(groups: Sequence[TensorGroup], outside: TensorGroup) -> ConvShape:
    """The decoder of a VAE; blocks of its encoder are left out of the pass."""
    level = 0
    blocks: list[tuple[Part, ...]] = []
    for group in groups:
        if "decoder." not in group.name and not group.name.startswith("decoder"):
            blocks.append(())
            continue
        here, change = _split_resampling(group)
        parts = [_part(here, 4.0**level)]
        if change is not None:
            level = min(level + 1, _DEEPEST_DECODER)
            parts.append(_part([change], 4.0**level))
        blocks.append(tuple(parts))
    fixed = [tensor for tensor in outside.tensors if "decoder." in tensor.name]
    last = [tensor for tensor in fixed if "conv_out." in tensor.name or "decoder.head." in tensor.name]
    channels = next((tensor.shape[1] for tensor in last if len(tensor.shape) >= 4), 128)
    dtype, element_bytes = _computes_in([*groups, outside])
    rest = [tensor for tensor in fixed if tensor not in last]
    return ConvShape(tuple(blocks), (_part(rest, 1.0), _part(last, 4.0**level)), channels, dtype=dtype, element_bytes=element_bytes)


def _split_resampling(group: TensorGroup) -> tuple[list[TensorFact], TensorFact | None]:
    change = next((tensor for tensor in group.tensors if _SHRINKS.search(tensor.name) or _GROWS.search(tensor.name)), None)
    return [tensor for tensor in group.tensors if tensor is not change], change


def _part(tensors: Sequence[TensorFact], scale: float) -> Part:
    conv = linear = text = conv_features = linear_features = queries = cross = calls = nbytes = 0
    for tensor in tensors:
        shape, name = tensor.shape, tensor.name.lower()
        if len(shape) < 2 or any(part in name for part in _MODULATION):
            continue
        count = element_count(shape)
        nbytes, calls = nbytes + tensor.nbytes, calls + 1
        if _CROSS_KEYS.search(name):
            text += count
        elif len(shape) > 2 and not re.search(r"attn_1\.|\.attentions\.\d+\.to_", name):
            conv, conv_features = conv + count, conv_features + shape[0] + shape[1]
        else:
            linear, linear_features = linear + count, linear_features + shape[0] + shape[1]
        if re.search(r"(\.q|\.to_q|\.query)\.weight", name):
            queries, cross = (queries, cross + shape[0]) if _CROSS.search(name) else (queries + shape[0], cross)
    return Part(scale, conv, linear, text, conv_features, linear_features, queries, cross, nbytes, max(calls, 1))


def _computes_in(groups: Sequence[TensorGroup]) -> tuple[str, int]:
    """The dtype that most bytes have, where it is one to compute in; bfloat16 for packed ones."""
    totals: Counter[str] = Counter()
    for group in groups:
        for tensor in group.tensors:
            totals[tensor.dtype] += tensor.nbytes
    most = totals.most_common(1)[0][0] if totals else "BF16"
    return (most, 4 if most == "F32" else 2) if most in PLAIN_TYPES - {"F64"} else ("BF16", 2)
