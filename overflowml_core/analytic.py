"""Passes of language models by arithmetic, for models whose code is not there or cannot be traced. Knows nothing of files and of torch.

Operations are counted as the tracer counts them: a multiply-add is two, attention is computed over the whole square of queries and keys.
Attention is a kind of its own, so "284.7 TFLOP" of Llama-3.1-70B over 2048 tokens, which a counter of matrix products gives, are the
products alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.activations import ASSUMED_TEXT_TOKENS, ASSUMED_TOKENS, first_int
from overflowml_core.facts import Block, Workload
from overflowml_core.work import BlockWork, PassProfile, Work

ASSUMED_NEW_TOKENS = 128
"""Tokens of an answer where the workload names none: a short paragraph."""

_WIDTH_VECTORS = 42
"""Vectors of the model's width that a layer moves outside its products for each token: two norms in float32 (18 each) and two residual sums
(3 each). Counted in transformers 5.23's LlamaDecoderLayer, operation by operation."""

_FEEDFORWARD_VECTORS = 5
"""The same for vectors of the feed-forward's width: the activation reads one and writes one, the gate reads two and writes one."""

_ROTARY_VECTORS = 10
"""The same for queries and keys: rotary embedding as ``apply_rotary_pos_emb`` computes it (two products, negation, join, sum)."""

_MATMUL_CALLS = 7
"""Products of a layer: queries, keys, values, output, gate, up, down (LlamaDecoderLayer)."""

_EXPERT_CALLS = 3
"""Grouped products over all experts: gate, up, down."""

_MEMORY_CALLS = 30
"""Operations of a layer that only move bytes (LlamaDecoderLayer, counted as above)."""

_PEAK_WIDTH_VECTORS = 6
"""Vectors of the model's width that are live at the peak of a pass, with three of the feed-forward's width: Llama-3.1-70B at 2048 tokens
traced, 1173 MiB of which 640 are its cache. A layer alone holds two and three beyond its inputs (400 MiB)."""

_STATE_TRAFFIC = 2
"""A recurrent state is read and written once in a pass."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of a layer.

    Attributes:
        heads: of the queries.
        key_size: features of a query or key in one head.
        value_size: features of a value in one head.
        cached_count: elements that a token leaves in the cache: keys and values of all key-value heads, or the latent of them.
        window: tokens that a query sees at most; 0 where it sees all.
    """

    heads: int
    key_size: int
    value_size: int
    cached_count: int
    window: int = 0

    def cached_tokens(self, tokens: int) -> int:
        """Tokens of a context of ``tokens`` that are kept."""
        return min(tokens, self.window) if self.window else tokens


@dataclass(frozen=True, slots=True)
class Routed:
    """A bank of experts: how many there are, how many a token uses, elements and bytes of one."""

    count: int
    per_token: int
    weight_count: int
    nbytes: int

    def used(self, tokens: int) -> int:
        """Experts that this many tokens reach together, if the router spreads them evenly: ``n * (1 - (1 - k/n)^tokens)``."""
        missed = (1 - self.per_token / self.count) ** tokens
        return min(self.count, max(self.per_token, round(self.count * (1 - missed))))


@dataclass(frozen=True, slots=True)
class Layer:
    """A block of a language model, as far as arithmetic needs it.

    Attributes:
        weight_count: elements of the matrices that every token is multiplied with; routed experts are not among them.
        weight_bytes: bytes of these.
        attention: None where the layer has none.
        routed: its experts, None in a dense layer.
        state_bytes: what it keeps of a sequence of any length (recurrent layers).
        runs: False where the model holds the layer and does not call it (layers that only guess further tokens).
    """

    weight_count: int
    weight_bytes: int
    attention: Attention | None = None
    routed: Routed | None = None
    state_bytes: int = 0
    runs: bool = True


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """A language model, as far as arithmetic needs it.

    Attributes:
        layers: one for each block of the component, in order.
        width: features of a token between the layers.
        feedforward: features inside the feed-forward part, of all experts that a token uses.
        head_count, head_bytes: elements and bytes of the matrix that makes logits; 0 where there are none.
        vocabulary: logits of a position.
        dtype: in which it computes, as safetensors spells it.
        element_bytes: of this dtype.
        generates: False for encoders, which run once and keep nothing.
    """

    layers: tuple[Layer, ...]
    width: int
    feedforward: int
    head_count: int = 0
    head_bytes: int = 0
    vocabulary: int = 0
    dtype: str = "BF16"
    element_bytes: int = 2
    generates: bool = True

    def cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the caches that sequences of this length leave, all layers together."""
        total = 0
        for layer in self.layers:
            if layer.runs and layer.attention is not None:
                total += layer.attention.cached_count * layer.attention.cached_tokens(tokens) * self.element_bytes
            total += layer.state_bytes if layer.runs else 0
        return total * batch


def language_model_profiles(shape: LanguageShape, workload: Workload, note: str = "") -> tuple[PassProfile, ...]:
    """Reading the prompt ("prefill") and one further token ("token"), or the one pass of an encoder ("encode").

    The first token of an answer comes out of the prefill, so an answer of n tokens takes n - 1 passes more. A token's work is that of the
    middle of the answer, its cache that of the end.

    Args:
        shape: the model.
        workload: tokens and batch.
        note: why this was not traced.
    """
    batch = workload.batch
    if not shape.generates:
        tokens = workload.prompt_tokens or ASSUMED_TEXT_TOKENS
        return (_profile("encode", 1, shape, _Pass(tokens, tokens, batch, 0), 0, note),)
    prompt = workload.prompt_tokens or ASSUMED_TOKENS
    answer = workload.new_tokens or ASSUMED_NEW_TOKENS
    prefill = _profile("prefill", 1, shape, _Pass(prompt, prompt, batch, 1), shape.cache_bytes(prompt, batch), note)
    if answer == 1:
        return (prefill,)
    token = _profile("token", answer - 1, shape, _Pass(1, prompt + answer // 2, batch, 1), shape.cache_bytes(prompt + answer, batch), note)
    return prefill, token


def language_shape(config: object, blocks: Sequence[Block], element_bytes: int, generates: bool) -> LanguageShape:
    """A transformers model's shape by its config and its blocks, where its code cannot be traced.

    Args:
        config: of a transformers model; composite ones are asked for their text part.
        blocks: of the component, in order.
        element_bytes: of the computation's dtype.
        generates: whether there are a cache and logits.
    """
    inner = getattr(config, "get_text_config", None)
    text = inner() if callable(inner) else config
    width = first_int(text, "hidden_size", "d_model", "n_embd", default=1024)
    heads = first_int(text, "num_attention_heads", "num_heads", "n_head", default=16)
    kv_heads = first_int(text, "num_key_value_heads", default=heads)
    size = first_int(text, "head_dim", "d_kv", default=max(width // max(heads, 1), 1))
    latent = first_int(text, "kv_lora_rank", default=0)
    key_size, value_size, cached = size, size, 2 * kv_heads * size
    if latent:  # DeepSeek's latent attention keeps the latent and the rotary part of the key
        rotary = first_int(text, "qk_rope_head_dim", default=0)
        key_size = first_int(text, "qk_nope_head_dim", default=size) + rotary
        value_size = first_int(text, "v_head_dim", default=size)
        cached = latent + rotary
    window = first_int(text, "sliding_window", default=0)
    kinds = getattr(text, "layer_types", None) or []
    feedforward = first_int(text, "intermediate_size", "d_ff", "n_inner", default=4 * width)
    layers: list[Layer] = []
    for number, block in enumerate(blocks):
        kind = kinds[number] if number < len(kinds) else "full_attention"
        seen = window if kind == "sliding_attention" else 0
        attention = Attention(heads, key_size, value_size, cached if generates else 0, seen) if "attention" in kind else None
        layers.append(_layer_of(block, None if kind == "linear_attention" else attention))
    vocabulary = first_int(text, "vocab_size", default=0) if generates else 0
    routed = next((layer.routed for layer in layers if layer.routed is not None), None)
    if routed is not None:
        feedforward = first_int(text, "moe_intermediate_size", default=feedforward) * routed.per_token
    return LanguageShape(
        layers=tuple(layers),
        width=width,
        feedforward=feedforward,
        head_count=vocabulary * width,
        head_bytes=vocabulary * width * element_bytes,
        vocabulary=vocabulary,
        dtype="F32" if element_bytes == 4 else "BF16",
        element_bytes=element_bytes,
        generates=generates,
    )


def _layer_of(block: Block, attention: Attention | None) -> Layer:
    element = block.stored_bytes / max(block.weight_count, 1)
    if block.experts is None:
        count = block.linear_count or block.weight_count
        return Layer(count, round(count * element), attention)
    bank = block.experts
    one = round(bank.nbytes / element) if element else 0
    rest = max(block.weight_count - bank.count * one, 0)
    return Layer(
        rest, max(block.stored_bytes - bank.count * bank.nbytes, 0), attention, Routed(bank.count, bank.per_token, one, bank.nbytes)
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Tokens of each sequence that pass through, tokens that they see, sequences, and positions of each that get logits."""

    tokens: int
    context: int
    batch: int
    logits: int


def _profile(name: str, count: int, shape: LanguageShape, size: _Pass, cache_bytes: int, note: str) -> PassProfile:
    rows = size.tokens * size.batch
    made: dict[Layer, BlockWork] = {}  # layers repeat, and thousands of equal ones share one object
    for layer in shape.layers:
        if layer not in made:
            made[layer] = _block_work(layer, shape, size)
    outside = _outside(shape, size)
    live = (_PEAK_WIDTH_VECTORS * shape.width + 3 * shape.feedforward) * rows * shape.element_bytes
    logits = shape.vocabulary * 4 * size.logits * size.batch  # in float32
    blocks = tuple(made[layer] for layer in shape.layers)
    return PassProfile(name, count, live + logits + cache_bytes, blocks, outside, cache_bytes, "analytic", note)


def _block_work(layer: Layer, shape: LanguageShape, size: _Pass) -> BlockWork:
    if not layer.runs:
        return BlockWork((), 0, 0)
    rows = size.tokens * size.batch
    vector = rows * shape.element_bytes
    works = []
    if layer.weight_count:
        moved = (4 * shape.width + (0 if layer.routed else 3 * shape.feedforward)) * vector
        flop = 2 * layer.weight_count * rows
        works.append(Work("matmul", shape.dtype, flop, moved + layer.weight_bytes, layer.weight_bytes, _MATMUL_CALLS))
    if layer.routed is not None:
        read = layer.routed.used(rows) * layer.routed.nbytes
        flop = 2 * layer.routed.weight_count * layer.routed.per_token * rows
        moved = (2 * layer.routed.per_token * shape.width + 3 * shape.feedforward) * vector
        works.append(Work("matmul", shape.dtype, flop, moved + read, read, _EXPERT_CALLS))
    memory = (
        _WIDTH_VECTORS * shape.width + _FEEDFORWARD_VECTORS * shape.feedforward
    ) * vector + _STATE_TRAFFIC * layer.state_bytes * size.batch
    if layer.attention is not None:
        works.append(_attention_work(layer.attention, shape, size))
        queries = layer.attention.heads * layer.attention.key_size
        memory += _ROTARY_VECTORS * (queries + layer.attention.cached_count // 2) * vector
    works.append(Work("memory", shape.dtype, 0, memory, 0, _MEMORY_CALLS))
    return BlockWork(tuple(works), (2 * shape.width + 3 * shape.feedforward) * vector)


def _attention_work(attention: Attention, shape: LanguageShape, size: _Pass) -> Work:
    seen = attention.cached_tokens(size.context)
    flop = 2 * size.batch * attention.heads * size.tokens * seen * (attention.key_size + attention.value_size)
    asked = size.tokens * attention.heads * (attention.key_size + attention.value_size)
    moved = (asked + seen * attention.cached_count) * size.batch * shape.element_bytes
    return Work("attention", shape.dtype, flop, moved)


def _outside(shape: LanguageShape, size: _Pass) -> tuple[Work, ...]:
    vector = shape.element_bytes * size.tokens * size.batch
    works = [Work("memory", shape.dtype, 0, 20 * shape.width * vector, 0, 12)]  # embedding and the last norm
    if shape.head_count and size.logits:
        rows = size.logits * size.batch
        moved = shape.head_bytes + (shape.width + shape.vocabulary) * shape.element_bytes * rows
        works.append(Work("matmul", shape.dtype, 2 * shape.head_count * rows, moved, shape.head_bytes))
    return tuple(works)
