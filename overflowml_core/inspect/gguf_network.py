"""A GGUF file as a network: blocks and experts by its tensors, passes by its metadata. Knows nothing of how the header is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from overflowml_core.analytic import Attention, LanguageShape, Layer, Routed, language_model_profiles
from overflowml_core.errors import BadCheckpoint, NotAModel
from overflowml_core.facts import Block, Experts, Network, TensorFact, Workload, network_fingerprint
from overflowml_core.inspect.gguf import GgufModel, open_gguf
from overflowml_core.inspect.gguf_caches import LayerCache, layer_caches
from overflowml_core.inspect.gguf_keys import AGAIN, Keys, block_count
from overflowml_core.inspect.image_shapes import image_component
from overflowml_core.inspect.tensor_groups import ComponentName, TensorGroup, element_count, make_block, make_component

_LAYER = re.compile(r"(?:v\.|enc\.|dec\.)?blk\.(\d{1,6})\.(.+)", re.ASCII)
_STACKED = re.compile(r"ffn_(?:gate|up|down|gate_up)_(?:ch)?exps\.(?:weight|bias|scale)")
_SINGLE_EXPERT = re.compile(r"ffn_(?:gate|up|down)\.(\d{1,6})\.weight", re.ASCII)  # Mixtral before experts were stacked


def network_of_gguf(path: str | os.PathLike[str], workload: Workload) -> Network:
    """Describe the model in a GGUF file (any part of a split one), reading headers alone.

    Args:
        path: the file.
        workload: what it will be asked to do.

    Raises:
        BadCheckpoint: the file is damaged, or its metadata contradicts its tensors.
        NotAModel: it holds no model (a vocabulary, an adapter).
    """
    return network_of_model(open_gguf(path), workload)


def network_of_model(model: GgufModel, workload: Workload) -> Network:
    """Describe a model whose headers were read.

    Args:
        model: its headers.
        workload: what it will be asked to do.

    Raises:
        BadCheckpoint: its metadata contradicts its tensors.
        NotAModel: it holds no model (a vocabulary, an adapter).
    """
    path = model.files[0]
    architecture = model.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadCheckpoint(model.files[0], f"general.architecture is {str(architecture)[:40]}, not a name", AGAIN)
    kind = model.metadata.get("general.type")
    if kind in ("adapter", "imatrix"):
        raise NotAModel(path, f"it holds an {kind} alone; give the model that it was made for")
    if not model.tensors:
        raise NotAModel(path, "it holds no tensors, only a vocabulary; give the model itself")
    tensors = [TensorFact(tensor.name, tensor.shape, tensor.type_name, tensor.nbytes) for tensor in model.tensors]
    groups, outside = _split(tensors)
    title = f"{architecture} (GGUF)"
    if not groups:  # image models keep the names of their checkpoints
        component = image_component(ComponentName("model", title), tensors, workload)
    else:
        prefix = "clip.vision" if architecture == "clip" else architecture
        keys = Keys(model, prefix, block_count(model, prefix, [int(group.name.rpartition(".")[2]) for group in groups]))
        per_token = keys.whole("expert_used_count")
        blocks = [_block(keys, group, per_token) for group in groups]
        shape = _language_shape(keys, groups, outside, blocks)
        note = f"by the header of a GGUF file: no code of {architecture} was run"
        component = make_component(ComponentName("model", title), groups, outside, blocks, language_model_profiles(shape, workload, note))
    return Network((component,), str(path), title, network_fingerprint((component,)))


def _split(tensors: Sequence[TensorFact]) -> tuple[tuple[TensorGroup, ...], TensorGroup]:
    layers: dict[tuple[str, int], list[TensorFact]] = {}
    outside: list[TensorFact] = []
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match is None:
            outside.append(tensor)
        else:
            layers.setdefault((tensor.name[: match.start(1)], int(match[1])), []).append(tensor)
    order = sorted(layers, key=lambda key: (not key[0].startswith("enc"), *key))
    groups = tuple(TensorGroup(f"{prefix}{number}", tuple(layers[prefix, number])) for prefix, number in order)
    return groups, TensorGroup("", tuple(outside))


def _block(keys: Keys, group: TensorGroup, per_token: int) -> Block:
    members = _expert_tensors(group)
    if not members:
        return make_block(group)
    singles = {match[1] for tensor in members if (match := _SINGLE_EXPERT.fullmatch(_inside(group, tensor)))}
    counts = {tensor.shape[0] for tensor in members if len(tensor.shape) == 3} | ({len(singles)} if singles else set())
    count, nbytes = min(counts, default=0), sum(tensor.nbytes for tensor in members)
    claimed = keys.whole("expert_count", count)
    if len(counts) != 1 or claimed != count or not 1 <= per_token <= count or nbytes % count:
        raise BadCheckpoint(
            keys.model.files[0],
            f"block {group.name} holds {sorted(counts)} experts; its metadata says {claimed}, of which a token uses {per_token}",
            AGAIN,
        )
    return make_block(group, Experts(count, nbytes // count, per_token), frozenset(tensor.name for tensor in members))


def _inside(group: TensorGroup, tensor: TensorFact) -> str:
    return tensor.name[len(group.name) + 1 :]


def _expert_tensors(group: TensorGroup) -> list[TensorFact]:
    return [t for t in group.tensors if _STACKED.fullmatch(_inside(group, t)) or _SINGLE_EXPERT.fullmatch(_inside(group, t))]


def _language_shape(keys: Keys, groups: Sequence[TensorGroup], outside: TensorGroup, blocks: Sequence[Block]) -> LanguageShape:
    named = {tensor.name: tensor for tensor in outside.tensors}
    embedding = named.get("token_embd.weight")
    width = keys.whole("embedding_length") or (embedding.shape[-1] if embedding is not None and embedding.shape else 0)
    if not width:
        raise BadCheckpoint(keys.model.files[0], f"{keys.architecture}.embedding_length is missing, and so is token_embd.weight", AGAIN)
    encoder = groups[0].name.startswith(("v.", "enc."))
    generates = not encoder and keys.model.metadata.get(f"{keys.architecture}.attention.causal") is not False
    head = named.get("output.weight", embedding)
    head_count = element_count(head.shape) if head is not None and generates else 0
    numbers = [int(group.name.rpartition(".")[2]) for group in groups]
    inside = {number: {_inside(group, t) for t in group.tensors} for number, group in zip(numbers, groups, strict=True)}
    caches, heads = layer_caches(keys, width, inside), keys.each("attention.head_count")
    latent_sizes = keys.whole("attention.key_length_mla"), keys.whole("attention.value_length_mla")
    last = keys.layers - keys.whole("nextn_predict_layers")
    layers = []
    for number, group, block in zip(numbers, groups, blocks, strict=True):
        cache = caches[number] if generates else replace(caches[number], key_count=0, value_count=0)
        layers.append(_layer(group, block, _attention(cache, heads[number], latent_sizes), cache.state_bytes, number < last))
    routed = next((block.experts for block in blocks if block.experts is not None), None)
    feedforward = keys.whole("feed_forward_length", 4 * width)
    if routed is not None:
        feedforward = (keys.whole("expert_feed_forward_length") or feedforward) * routed.per_token
    return LanguageShape(
        layers=tuple(layers),
        width=width,
        feedforward=feedforward,
        head_count=head_count,
        head_bytes=head.nbytes if head is not None and generates else 0,
        vocabulary=head_count // width,
        generates=generates,
    )


def _attention(cache: LayerCache, heads: int, latent_sizes: tuple[int, int]) -> Attention | None:
    """The attention of a layer, if it makes queries; latent attention computes with other sizes than it keeps."""
    if not cache.key_size or not heads:
        return None
    key_size, value_size = latent_sizes[0] or cache.key_size, latent_sizes[1] or cache.value_size
    return Attention(heads, key_size, value_size, cache.key_count + cache.value_count, cache.window)


def _layer(group: TensorGroup, block: Block, attention: Attention | None, state_bytes: int, runs: bool) -> Layer:
    members = _expert_tensors(group)
    matrices = [tensor for tensor in group.tensors if len(tensor.shape) > 1 and tensor not in members]
    bank, routed = block.experts, None
    if bank is not None:
        routed = Routed(bank.count, bank.per_token, sum(element_count(t.shape) for t in members) // bank.count, bank.nbytes)
    return Layer(
        weight_count=sum(element_count(tensor.shape) for tensor in matrices),
        weight_bytes=sum(tensor.nbytes for tensor in matrices),
        attention=attention,
        routed=routed,
        state_bytes=state_bytes,
        runs=runs,
    )


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file calls itself GGUF by its name."""
    return Path(path).suffix.lower() == ".gguf"
