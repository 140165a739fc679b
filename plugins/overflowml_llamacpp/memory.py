"""What a placement takes of the device and of RAM in llama.cpp, and what a token reads of both. Decides nothing, predicts no time.

Weights and caches are exact for llama.cpp build 11434, the compute buffer is an estimate; see note [compute buffer].

Note [compute buffer]. llama.cpp reserves it for a batch of 512 tokens. It holds hidden states, and at its peak either the inside of a layer
or the logits of the whole batch in float32 (newer servers ask for fewer of them); masks of two bytes for each token of a context; and on a
device a copy of the largest weight that waits in RAM and is multiplied with there while a prompt is read. On the CPU build 11549 reported
109.6 MiB for SmolLM2-135M at 8192 tokens (estimate 108.5); of tiny models of six architectures estimates were 5 % below to 14 % above. Of
Qwen2.5-7B (Q6_K) with its output in RAM a CUDA device took 730.4 MiB (home-ops, pull request 11640), 426.4 of them the copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from overflowml_core.errors import BadLimits
from overflowml_core.inspect.gguf_caches import LayerCache
from overflowml_llamacpp.model import Layer, LlamaModel

BATCH_TOKENS = 512
"""``n_ubatch``: tokens that are computed at once (common/common.h)."""

_CELLS = 256
"""Contexts and windows are padded to as many tokens (src/llama-context.cpp, src/llama-kv-cache-iswa.cpp)."""

_HIDDEN_BYTES = 4
_MASK_BYTES = 2
_LIVE_HIDDEN = 4  # the residual, a norm of it, and both again while they are added
_LIVE_FEEDFORWARDS = 3  # gate, up and their product


@dataclass(frozen=True, slots=True)
class CacheType:
    """A type of the cache: its name, and bytes of a group of elements that are stored together."""

    name: str
    group_count: int
    group_bytes: int

    def nbytes(self, count: int) -> int:
        """Bytes of so many elements; whole groups."""
        return count // self.group_count * self.group_bytes

    def holds(self, cache: LayerCache) -> bool:
        """Whether heads of these sizes divide into its groups, which llama.cpp demands."""
        return not (cache.key_size % self.group_count or (cache.value_count and cache.value_size % self.group_count))


CACHE_TYPES = {kind.name: kind for kind in (CacheType("f16", 1, 2), CacheType("q8_0", 32, 34), CacheType("q4_0", 32, 18))}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where llama.cpp puts what.

    Attributes:
        gpu_layers: ``-ngl``: the last layers on the device, the output first of all.
        cpu_moe: ``--n-cpu-moe``: the first layers whose routed experts stay on the CPU.
        cpu_tensors: further tensors of experts that stay there (``-ot``).
        cache: type of keys and values.
    """

    gpu_layers: int
    cpu_moe: int
    cpu_tensors: tuple[str, ...]
    cache: CacheType


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a placement.

    Attributes:
        device_weight_bytes, device_cache_bytes: on the device.
        compute_bytes: estimate of the compute buffer there.
        context_bytes: what the device's driver takes for a process.
        host_weight_bytes, host_cache_bytes: in RAM.
        device_read_bytes, host_read_bytes: what one token reads of each, at half the context.
    """

    device_weight_bytes: int
    device_cache_bytes: int
    compute_bytes: int
    context_bytes: int
    host_weight_bytes: int
    host_cache_bytes: int
    device_read_bytes: int
    host_read_bytes: int

    @property
    def device_bytes(self) -> int:
        """All of the device."""
        return self.device_weight_bytes + self.device_cache_bytes + self.compute_bytes + self.context_bytes


def padded_tokens(tokens: int) -> int:
    """The context that llama.cpp makes of one asked for.

    Raises:
        BadLimits: it is none.
    """
    if not 1 <= tokens < 2**31:
        raise BadLimits(f"--ctx={tokens}: a context has 1 to 2147483647 tokens; write a number such as 16384")
    return -(-tokens // _CELLS) * _CELLS


def cells(cache: LayerCache, tokens: int) -> int:
    """Tokens that a layer has room for: all, or a window and a batch (``llama_kv_cache_iswa``).

    Args:
        cache: of the layer.
        tokens: of the padded context.
    """
    if not cache.window:
        return tokens
    return -(-min(tokens, cache.window + BATCH_TOKENS) // _CELLS) * _CELLS


@functools.lru_cache(maxsize=4096)
def cache_bytes(cache: LayerCache, kind: CacheType, tokens: int) -> int:
    """Bytes that a layer reserves for one sequence.

    Args:
        cache: of the layer.
        kind: type of keys and values.
        tokens: of the padded context.
    """
    return (kind.nbytes(cache.key_count) + kind.nbytes(cache.value_count)) * cells(cache, tokens) + cache.state_bytes


def _read_cache_bytes(cache: LayerCache, kind: CacheType, tokens: int) -> int:
    """What a token reads of a layer's cache when half of the context is filled; a state is read and written."""
    filled = min(tokens // 2, cache.window or tokens)
    return (kind.nbytes(cache.key_count) + kind.nbytes(cache.value_count)) * filled + 2 * cache.state_bytes


def memory_of(model: LlamaModel, placement: Placement, tokens: int, context_bytes: int = 0) -> Memory:
    """What a placement takes.

    Args:
        model: what is placed.
        placement: where.
        tokens: of the padded context, one sequence.
        context_bytes: what a process takes of the device before its first tensor.
    """
    total, kind = len(model.layers), placement.cache
    first = max(total + 1 - placement.gpu_layers, 0)
    away = frozenset(placement.cpu_tensors)
    device = _Sum()
    host = _Sum(weights=model.input_bytes)
    for number, layer in enumerate(model.layers):
        own = device if number >= first else host
        own.weights += layer.dense_bytes
        own.reads += layer.dense_read_bytes + _read_cache_bytes(layer.cache, kind, tokens)
        own.caches += cache_bytes(layer.cache, kind, tokens)
        for name, nbytes in layer.experts:
            place = host if number < placement.cpu_moe or name in away else own
            place.weights += nbytes
            place.reads += nbytes * layer.expert_read_bytes // max(layer.expert_bytes, 1)
            if place is host:
                host.largest = max(host.largest, nbytes)
        if own is host:
            host.largest = max(host.largest, layer.largest_dense_bytes)
    output = device if placement.gpu_layers else host
    output.reads += model.output_bytes + model.tied_bytes
    output.weights += model.output_bytes + (model.tied_bytes if output is device else 0)
    used = bool(placement.gpu_layers)
    return Memory(
        device_weight_bytes=device.weights,
        device_cache_bytes=device.caches,
        compute_bytes=compute_bytes(model, tokens, host.largest) if used else 0,
        context_bytes=context_bytes if used else 0,
        host_weight_bytes=host.weights,
        host_cache_bytes=host.caches,
        device_read_bytes=device.reads,
        host_read_bytes=host.reads,
    )


@dataclass(slots=True)
class _Sum:
    weights: int = 0
    caches: int = 0
    reads: int = 0
    largest: int = 0


def compute_bytes(model: LlamaModel, tokens: int, largest_host_bytes: int) -> int:
    """Estimate of the compute buffer on a device; see note [compute buffer].

    Args:
        model: whose.
        tokens: of the padded context.
        largest_host_bytes: of the largest weight that waits in RAM.
    """
    inside = max(_LIVE_FEEDFORWARDS * model.feedforward, model.attention)
    features = _LIVE_HIDDEN * model.width + max(model.vocabulary, inside)
    masked = tokens + max((cells(layer.cache, tokens) for layer in model.layers if layer.cache.window), default=0)
    return BATCH_TOKENS * (features * _HIDDEN_BYTES + masked * _MASK_BYTES) + largest_host_bytes


def fitting_types(layers: Iterable[Layer], kinds: Iterable[CacheType]) -> tuple[CacheType, ...]:
    """Of these types those that hold the caches of all layers."""
    caches = [layer.cache for layer in layers]
    return tuple(kind for kind in kinds if all(kind.holds(cache) for cache in caches))
