"""A GGUF model as llama.cpp divides it: what waits in RAM always, layers with their experts, and the output layer. Decides nothing.

Follows llama.cpp build 11434: tensors by layer from ``LLM_TENSOR_INFOS`` (src/llama-arch.cpp) and ``load_tensors`` (src/llama-model.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from overflowml_core.errors import BadCheckpoint, NotAModel, Unsupported
from overflowml_core.facts import Block, Workload
from overflowml_core.inspect.gguf import GgufModel, GgufTensor, open_gguf
from overflowml_core.inspect.gguf_caches import LayerCache, layer_caches
from overflowml_core.inspect.gguf_keys import AGAIN, Keys
from overflowml_core.inspect.gguf_network import network_of_model

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)", re.ASCII)
_EXPERTS = re.compile(r"ffn_(?:up|down|gate|gate_up)_(?:ch)?exps\..+")
"""What ``--n-cpu-moe`` keeps on the CPU (``LLM_FFN_EXPS_REGEX``, common/common.h)."""

_INPUT = ("token_embd.", "token_embd_norm.", "position_embd.", "token_types.", "per_layer_token_embd.")
"""Tensors of the input layer, which llama.cpp keeps on the CPU always."""

_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS of src/llama-hparams.h
_REQUIRED = ("block_count", "context_length", "embedding_length")
"""Keys without which llama.cpp loads no model (``load_hparams``, src/llama-model.cpp)."""

_OTHER_CACHES = frozenset({"deepseek4", "dots3note", "glm5-next", "hy_v4", "kimi-k3", "minimax-m3", "minimax-01", "qwen4exp"})
"""Architectures with a cache of their own kind in llama.cpp (``create_memory``), of which the common formula knows a part alone."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        dense_bytes: weights that are no routed experts.
        dense_read_bytes: of these, what a token reads.
        experts: (name, bytes) of the tensors that hold routed experts, those of one product together ("blk.3.ffn_up_exps").
        expert_read_bytes: of these, what a token reads.
        largest_dense_bytes: the largest single one of its other tensors.
        cache: what it keeps of a sequence.
    """

    dense_bytes: int = 0
    dense_read_bytes: int = 0
    experts: tuple[tuple[str, int], ...] = ()
    expert_read_bytes: int = 0
    largest_dense_bytes: int = 0
    cache: LayerCache = field(default_factory=LayerCache)

    @property
    def expert_bytes(self) -> int:
        """All of its routed experts."""
        return sum(nbytes for _, nbytes in self.experts)


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """A model.

    Attributes:
        files: its parts, in order.
        architecture: as llama.cpp names it.
        name: as the file names it; empty where it does not.
        layers: in order; those that only guess further tokens hold nothing, for llama.cpp does not load them.
        input_bytes: weights that stay in RAM: embeddings, of which a token reads one row.
        output_bytes: weights behind the last layer, on the device with ``-ngl 1`` already.
        tied_bytes: of the embedding where it is the output, too, and is then held twice; 0 else.
        width, feedforward, vocabulary: features between and inside the layers, and logits.
        attention: features of all heads of a layer: of queries, of queries as they meet the cache, and of what comes out.
        context_length: tokens that it was trained with.
        experts: (routed experts of a layer, those that a token uses); zeros for a dense model.
        warnings: what is not known of it.
    """

    files: tuple[Path, ...]
    architecture: str
    name: str
    layers: tuple[Layer, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int
    width: int
    feedforward: int
    vocabulary: int
    attention: int
    context_length: int
    experts: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """All weights that llama.cpp loads, a tied output once."""
        return self.input_bytes + self.output_bytes + sum(layer.dense_bytes + layer.expert_bytes for layer in self.layers)


def read_model(path: Path) -> LlamaModel:
    """Read the headers of a model's files.

    Args:
        path: of the file, or of any part of a split one.

    Raises:
        BadCheckpoint: a file is missing, damaged or lacks a key that llama.cpp needs.
        NotAModel: it is a vision projector, an adapter, a vocabulary or an image model.
        Unsupported: it generates no text, or has more layers than llama.cpp takes.
    """
    model = open_gguf(path, unknown_types=True)
    architecture = _architecture(model)
    network = network_of_model(model, Workload())
    keys = Keys(model, architecture, _layer_count(model, architecture))
    if keys.raw("attention.causal") is False or any(t.name.startswith(("enc.", "v.")) for t in model.tensors):
        raise Unsupported(
            f"{path}: {architecture} is an encoder, not a model that answers; give llama-server --embedding and -ngl all for it"
        )
    inside: dict[int, list[tuple[str, GgufTensor]]] = {}
    outside: list[GgufTensor] = []
    for tensor in model.tensors:
        match = _BLOCK.fullmatch(tensor.name)
        if match is None:
            outside.append(tensor)
        else:
            inside.setdefault(int(match[1]), []).append((match[2], tensor))
    caches = layer_caches(keys, keys.whole("embedding_length"), {i: {name for name, _ in members} for i, members in inside.items()})
    heads = keys.each("attention.head_count")
    blocks = {block.name: block for block in network.components[0].blocks}
    running = keys.layers - keys.whole("nextn_predict_layers")
    layers = tuple(
        _layer(inside[i], blocks.get(f"blk.{i}"), caches[i]) if i in inside and i < running else Layer() for i in range(keys.layers)
    )
    output = [tensor for tensor in outside if not tensor.name.startswith(_INPUT)]
    embedding = next((tensor for tensor in outside if tensor.name == "token_embd.weight"), None)
    bank = next((block.experts for block in blocks.values() if block.experts is not None), None)
    return LlamaModel(
        files=model.files,
        architecture=architecture,
        name=_text(model, "general.name"),
        layers=layers,
        input_bytes=sum(tensor.nbytes for tensor in outside if tensor.name.startswith(_INPUT)),
        output_bytes=sum(tensor.nbytes for tensor in output),
        tied_bytes=0 if embedding is None or any(tensor.name == "output.weight" for tensor in output) else embedding.nbytes,
        width=keys.whole("embedding_length"),
        feedforward=_feedforward(keys),
        vocabulary=embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0,
        attention=max((heads[i] * (2 * cache.key_size + cache.value_size) for i, cache in caches.items()), default=0),
        context_length=keys.whole("context_length"),
        experts=(0, 0) if bank is None else (bank.count, bank.per_token),
        warnings=tuple(_warnings(model, keys, running)),
    )


def _architecture(model: GgufModel) -> str:
    """The name under which the keys stand, after what is no language model was turned away."""
    first, name = model.files[0], model.metadata.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise BadCheckpoint(first, f"general.architecture is {str(name)[:40]}, not a name", AGAIN)
    if name == "clip" or model.metadata.get("general.type") == "mmproj":
        raise NotAModel(
            first, "it is a vision projector; give the language model that it belongs to, and this one to llama-server's --mmproj"
        )
    if model.tensors and not any(_BLOCK.fullmatch(tensor.name) for tensor in model.tensors):
        raise NotAModel(first, f"{name} has no layers that llama.cpp runs (tensors named blk.0.*); is it an image model?")
    return name


def _layer_count(model: GgufModel, architecture: str) -> int:
    missing = [f"{architecture}.{key}" for key in _REQUIRED if f"{architecture}.{key}" not in model.metadata]
    if missing:
        raise BadCheckpoint(model.files[0], f"{', '.join(missing)} is missing, without which llama.cpp loads no model", AGAIN)
    count = Keys(model, architecture, 1).whole("block_count")
    if count > _MOST_LAYERS:
        raise Unsupported(f"{model.files[0]}: {architecture}.block_count is {count}; llama.cpp takes at most {_MOST_LAYERS} layers")
    return count


def _layer(members: Iterable[tuple[str, GgufTensor]], block: Block | None, cache: LayerCache) -> Layer:
    experts: dict[str, int] = {}
    dense = []
    for name, tensor in members:
        if _EXPERTS.fullmatch(name):
            product = ".".join(tensor.name.split(".")[:3])
            experts[product] = experts.get(product, 0) + tensor.nbytes
        else:
            dense.append(tensor.nbytes)
    largest, bank = max(dense, default=0), None if block is None else block.experts
    if bank is None:
        return Layer(sum(dense), sum(dense), (), 0, largest, cache)
    if not experts:  # Mixtral before experts were stacked: each is a tensor of its own, and no flag moves them
        return Layer(sum(dense), sum(dense) - bank.nbytes * (bank.count - bank.per_token), (), 0, largest, cache)
    return Layer(sum(dense), sum(dense), tuple(experts.items()), bank.nbytes * bank.per_token, largest, cache)


def _feedforward(keys: Keys) -> int:
    return max(keys.whole("feed_forward_length"), keys.whole("expert_feed_forward_length") * keys.whole("expert_used_count"))


def _text(model: GgufModel, key: str) -> str:
    value = model.metadata.get(key)
    return value if isinstance(value, str) else ""


def _warnings(model: GgufModel, keys: Keys, running: int) -> Iterable[str]:
    unknown = [tensor for tensor in model.tensors if tensor.by_offset]
    if unknown:
        kinds = ", ".join(sorted({tensor.type_name for tensor in unknown}))
        yield (
            f"{len(unknown)} tensors are of ggml types that are not known ({kinds}; the first is {unknown[0].name[:80]}); their bytes are "
            "those up to the next tensor. Only the fork of llama.cpp that made the file loads it"
        )
    if keys.architecture in _OTHER_CACHES:
        yield f"{keys.architecture} has a cache of its own kind in llama.cpp; what is counted here is a part of it: leave more room"
    if running < keys.layers:
        yield f"{keys.layers - running} layers only guess further tokens; llama-server does not load them unless it is told to"
