"""Language models and text encoders by the names and shapes of their tensors, where there is no configuration. Knows nothing of files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from overflowml_core.analytic import Attention, LanguageShape, Layer, Routed, language_model_profiles
from overflowml_core.facts import Block, Component, Experts, TensorFact, Workload
from overflowml_core.inspect.tensor_groups import ComponentName, TensorGroup, element_count, find_groups, make_block, make_component

_CLASSES = (
    ("text_model.encoder.layers.", "CLIPTextModel"),
    ("encoder.block.0.layer.0.SelfAttention", "T5EncoderModel"),
    ("transformer.resblocks.", "OpenCLIP's text model"),
    ("model.layers.0.self_attn", "a decoder of transformers"),
)
"""Evidence and class; the last of them alone generates."""

_GENERATES = ("lm_head.", "model.layers.", "transformer.h.")
_QUERY = re.compile(r"(q_proj|q_b_proj|query|SelfAttention\.q|attn\.q)\.weight$")
_CACHED = re.compile(r"(k_proj|v_proj|key|value|SelfAttention\.[kv]|attn\.[kv]|kv_a_proj_with_mqa)\.weight$")
_FUSED = re.compile(r"(qkv_proj|query_key_value|c_attn|in_proj_weight|Wqkv)(\.weight)?$")
_OUTPUT = re.compile(r"(o_proj|out_proj|attn\.c_proj|attention\.dense|Wo)\.weight$")
_EXPERT = re.compile(r"\.experts\.(?:(\d{1,6})\.)?", re.ASCII)
_DOWN = re.compile(r"(down_proj|fc2|wo|w2|c_proj|dense_4h_to_h)\.weight$")
_EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|token_embedding|shared)\.weight$")

ASSUMED_PER_TOKEN = 8
"""Experts that a token uses, which no header says: Qwen 3, DeepSeek-V3 and Kimi-K2 use 8; of fewer than 32 experts, 2 (Mixtral)."""

_MANY_EXPERTS = 32


def language_component(name: ComponentName, tensors: Sequence[TensorFact], workload: Workload) -> Component | None:
    """A language model or text encoder, None where the names are of neither.

    Args:
        name: what to call it; the class is filled in where none was given.
        tensors: all of its tensors, under their names inside the component.
        workload: tokens and batch.
    """
    names = "\n".join(tensor.name for tensor in tensors)
    class_name = next((title for evidence, title in _CLASSES if evidence in names), None)
    if class_name is None and not any(part in names for part in _GENERATES):
        return None
    groups, outside = find_groups(tensors)
    if not groups:
        return None
    encoder = class_name is not None and class_name != _CLASSES[-1][1]
    blocks = [_block(group) for group in groups]
    embedding = next((t for t in tensors if _EMBEDDING.search(t.name) and len(t.shape) == 2), None)
    head = next((t for t in outside.tensors if t.name.endswith("lm_head.weight") and len(t.shape) == 2), embedding)
    if embedding is None and head is None:
        return None
    width = (embedding or head).shape[1]  # type: ignore[union-attr]
    head_count = 0 if head is None or encoder else element_count(head.shape)
    routed = next((block.experts for block in blocks if block.experts is not None), None)
    downs = [t.shape[1] for g in groups for t in g.tensors if len(t.shape) == 2 and _DOWN.search(t.name) and t.shape[0] == width]
    wide = max(tensor.nbytes for tensor in tensors) and all(tensor.dtype == "F32" for tensor in tensors)
    shape = LanguageShape(
        layers=tuple(_layer(group, block, cached=not encoder) for group, block in zip(groups, blocks, strict=True)),
        width=width,
        feedforward=max(downs, default=4 * width) * (routed.per_token if routed else 1),
        head_count=head_count,
        head_bytes=0 if head is None or encoder else head.nbytes,
        vocabulary=head_count // max(width, 1),
        dtype="F32" if wide else "BF16",
        element_bytes=4 if wide else 2,
        generates=not encoder,
    )
    note = "by the shapes of its tensors: there is no configuration" + (
        "" if routed is None else f"; {routed.per_token} experts a token assumed"
    )
    titled = ComponentName(name.name, name.class_name or class_name or "a language model")
    return make_component(titled, groups, outside, blocks, language_model_profiles(shape, workload, note))


def _expert_tensors(group: TensorGroup) -> list[TensorFact]:
    return [tensor for tensor in group.tensors if _EXPERT.search(tensor.name)]


def _block(group: TensorGroup) -> Block:
    members = _expert_tensors(group)
    numbers = {match[1] for tensor in members if (match := _EXPERT.search(tensor.name)) and match[1]}
    count = len(numbers) or max((tensor.shape[0] for tensor in members if len(tensor.shape) == 3), default=0)
    nbytes = sum(tensor.nbytes for tensor in members)
    if count < 2 or nbytes // count == 0:
        return make_block(group)
    per_token = min(ASSUMED_PER_TOKEN if count >= _MANY_EXPERTS else 2, count)
    return make_block(group, Experts(count, nbytes // count, per_token), frozenset(tensor.name for tensor in members))


def _layer(group: TensorGroup, block: Block, cached: bool) -> Layer:
    members = _expert_tensors(group) if block.experts is not None else []
    matrices = [tensor for tensor in group.tensors if len(tensor.shape) == 2 and tensor not in members]
    routed = None
    if block.experts is not None:
        count = sum(element_count(tensor.shape) for tensor in members) // block.experts.count
        routed = Routed(block.experts.count, block.experts.per_token, count, block.experts.nbytes)
    queries, keys = _attention_rows(matrices)
    # Products and cache depend on heads times size alone, so one head stands for all.
    attention = Attention(1, queries, queries, keys if cached else 0) if queries else None
    return Layer(sum(element_count(t.shape) for t in matrices), sum(t.nbytes for t in matrices), attention, routed)


def _attention_rows(matrices: Sequence[TensorFact]) -> tuple[int, int]:
    """Features of the queries, and of what is cached."""
    fused = next((tensor for tensor in matrices if _FUSED.search(tensor.name)), None)
    if fused is not None:
        output = next((tensor.shape[1] for tensor in matrices if _OUTPUT.search(tensor.name)), fused.shape[0] // 3)
        return output, max(fused.shape[0] - output, 0)
    queries = sum(tensor.shape[0] for tensor in matrices if _QUERY.search(tensor.name))
    return queries, sum(tensor.shape[0] for tensor in matrices if _CACHED.search(tensor.name))
