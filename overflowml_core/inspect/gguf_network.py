"""A GGUF file as a network: blocks and experts by its tensors, passes by its metadata. Knows nothing of how the header is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overflowml_core.analytic import Attention, LanguageShape, Layer, Routed, language_model_profiles
from overflowml_core.errors import BadCheckpoint, NotAModel
from overflowml_core.facts import Block, Experts, Network, TensorFact, Workload, network_fingerprint
from overflowml_core.inspect.gguf import GgufModel, open_gguf
from overflowml_core.inspect.gguf_cursor import LongValue, Value
from overflowml_core.inspect.image_shapes import image_component
from overflowml_core.inspect.tensor_groups import ComponentName, TensorGroup, element_count, make_block, make_component

_LAYER = re.compile(r"(?:v\.|enc\.|dec\.)?blk\.(\d{1,6})\.(.+)", re.ASCII)
_STACKED = re.compile(r"ffn_(?:gate|up|down|gate_up)_(?:ch)?exps\.(?:weight|bias|scale)")
_SINGLE_EXPERT = re.compile(r"ffn_(?:gate|up|down)\.(\d{1,6})\.weight", re.ASCII)  # Mixtral before experts were stacked
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "gemma3n": 5, "smallthinker": 4}
"""Of how many layers one sees the whole context where the file does not say: what llama.cpp sets for these architectures
(``set_swa_pattern`` in src/llama-model.cpp)."""

_STATE_ELEMENT_BYTES = 4  # llama.cpp keeps recurrent states in float32
_AGAIN = "convert it again, or download another copy"


@dataclass(frozen=True, slots=True)
class _Keys:
    """Metadata of one architecture, read with its type checked."""

    model: GgufModel
    architecture: str
    layers: int

    def whole(self, key: str, default: int = 0) -> int:
        """A count under ``<architecture>.<key>``; the largest where there is one for each layer.

        Raises:
            BadCheckpoint: it is no count below 2**31.
        """
        value = self.model.metadata.get(f"{self.architecture}.{key}", default)
        return max(self._counts(key, value if isinstance(value, tuple) else (value,)), default=default)

    def each(self, key: str) -> tuple[int, ...]:
        """A count for every layer, 0 where nobody said.

        Raises:
            BadCheckpoint: it is no count below 2**31, or there are not as many as layers.
        """
        value = self.model.metadata.get(f"{self.architecture}.{key}", 0)
        if not isinstance(value, tuple):
            return self._counts(key, (value,)) * self.layers
        if len(value) < self.layers:
            raise self._unfit(key, value)
        return self._counts(key, value)

    def _counts(self, key: str, values: tuple[Value | LongValue, ...]) -> tuple[int, ...]:
        counts = tuple(int(value) for value in values if isinstance(value, int) and 0 <= value < 2**31)
        if len(counts) < len(values):
            raise self._unfit(key, values if len(values) > 1 else values[0])
        return counts

    def _unfit(self, key: str, value: object) -> BadCheckpoint:
        shown = f"{self.architecture}.{key} is {str(value)[:80]}"
        expected = f"expected a whole number below 2**31, or one for each of {self.layers} blocks"
        return BadCheckpoint(self.model.files[0], f"{shown}; {expected}", _AGAIN)


def network_of_gguf(path: str | os.PathLike[str], workload: Workload) -> Network:
    """Describe the model in a GGUF file (any part of a split one), reading headers alone.

    Args:
        path: the file.
        workload: what it will be asked to do.

    Raises:
        BadCheckpoint: the file is damaged, or its metadata contradicts its tensors.
        NotAModel: it holds no model (a vocabulary, an adapter).
    """
    model = open_gguf(path)
    architecture = model.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadCheckpoint(model.files[0], f"general.architecture is {str(architecture)[:40]}, not a name", _AGAIN)
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
        keys = _Keys(model, prefix, _block_count(model, prefix, groups))
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


def _block_count(model: GgufModel, architecture: str, groups: Sequence[TensorGroup]) -> int:
    """Layers by the metadata, held against the tensors. A layer without tensors is a layer (DeciLM skips some)."""
    numbers = [int(group.name.rpartition(".")[2]) for group in groups]
    key = f"{architecture}.block_count"
    claimed = model.metadata.get(key, max(numbers) + 1)
    if not isinstance(claimed, int) or isinstance(claimed, bool) or claimed <= max(numbers) or claimed > 2 * len(set(numbers)):
        raise BadCheckpoint(
            model.files[0], f"{key} is {str(claimed)[:40]}, its tensors make {len(set(numbers))} blocks up to number {max(numbers)}", _AGAIN
        )
    return claimed


def _block(keys: _Keys, group: TensorGroup, per_token: int) -> Block:
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
            _AGAIN,
        )
    return make_block(group, Experts(count, nbytes // count, per_token), frozenset(tensor.name for tensor in members))


def _inside(group: TensorGroup, tensor: TensorFact) -> str:
    return tensor.name[len(group.name) + 1 :]


def _expert_tensors(group: TensorGroup) -> list[TensorFact]:
    return [t for t in group.tensors if _STACKED.fullmatch(_inside(group, t)) or _SINGLE_EXPERT.fullmatch(_inside(group, t))]


def _language_shape(keys: _Keys, groups: Sequence[TensorGroup], outside: TensorGroup, blocks: Sequence[Block]) -> LanguageShape:
    named = {tensor.name: tensor for tensor in outside.tensors}
    embedding = named.get("token_embd.weight")
    width = keys.whole("embedding_length") or (embedding.shape[-1] if embedding is not None and embedding.shape else 0)
    if not width:
        raise BadCheckpoint(keys.model.files[0], f"{keys.architecture}.embedding_length is missing, and so is token_embd.weight", _AGAIN)
    encoder = groups[0].name.startswith(("v.", "enc."))
    generates = not encoder and keys.model.metadata.get(f"{keys.architecture}.attention.causal") is not False
    head = named.get("output.weight", embedding)
    head_count = element_count(head.shape) if head is not None and generates else 0
    attention = _attention(keys, width, generates)
    last = keys.layers - keys.whole("nextn_predict_layers")
    layers = []
    for group, block in zip(groups, blocks, strict=True):
        number = int(group.name.rpartition(".")[2])
        layers.append(_layer(keys, group, block, attention[number], number < last))
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


def _attention(keys: _Keys, width: int, generates: bool) -> list[Attention | None]:
    """The attention of each layer, if it has one. Latent attention caches the latent and the rotary part of the key."""
    heads, kv_heads = keys.each("attention.head_count"), keys.each("attention.head_count_kv")
    latent = keys.whole("attention.kv_lora_rank")
    window = keys.whole("attention.sliding_window")
    full = _full_layers(keys) if window else [True] * keys.layers
    found: list[Attention | None] = []
    for number in range(keys.layers):
        count = heads[number]
        if not count:
            found.append(None)
            continue
        key_size = keys.whole("attention.key_length") or max(width // count, 1)
        value_size = keys.whole("attention.value_length") or key_size
        cached = (kv_heads[number] or count) * (key_size + value_size)
        if latent:
            cached = latent + keys.whole("rope.dimension_count", 64)
            key_size, value_size = keys.whole("attention.key_length_mla", key_size), keys.whole("attention.value_length_mla", value_size)
        found.append(Attention(count, key_size, value_size, cached if generates else 0, 0 if full[number] else window))
    return found


def _full_layers(keys: _Keys) -> list[bool]:
    """Which layers see the whole context though the model has a sliding window. Where nobody says, all do: more memory, never less."""
    pattern = keys.model.metadata.get(f"{keys.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) >= keys.layers:
        return [not slides for slides in pattern]
    period = pattern if isinstance(pattern, int) and not isinstance(pattern, bool) else _WINDOW_PERIODS.get(keys.architecture, 1)
    return [(number + 1) % period == 0 for number in range(keys.layers)] if period > 0 else [True] * keys.layers


def _layer(keys: _Keys, group: TensorGroup, block: Block, attention: Attention | None, runs: bool) -> Layer:
    names = {_inside(group, tensor) for tensor in group.tensors}
    recurrent = any(name.startswith(("ssm_", "time_mix_", "shortconv.")) for name in names)
    keys_made = "attn_k.weight" in names or any(name.startswith("attn_kv_") for name in names)
    has_attention = keys_made or ("attn_qkv.weight" in names and not recurrent)
    members = _expert_tensors(group)
    matrices = [tensor for tensor in group.tensors if len(tensor.shape) > 1 and tensor not in members]
    bank, routed = block.experts, None
    if bank is not None:
        routed = Routed(bank.count, bank.per_token, sum(element_count(t.shape) for t in members) // bank.count, bank.nbytes)
    return Layer(
        weight_count=sum(element_count(tensor.shape) for tensor in matrices),
        weight_bytes=sum(tensor.nbytes for tensor in matrices),
        attention=attention if has_attention else None,
        routed=routed,
        state_bytes=_state_bytes(keys, names) if recurrent else 0,
        runs=runs,
    )


def _state_bytes(keys: _Keys, names: set[str]) -> int:
    """What a recurrent layer keeps of a sequence: the ends of its convolutions and its state (llama.cpp, ``n_embd_r`` and ``n_embd_s``)."""
    width = keys.whole("embedding_length")
    if any(name.startswith("time_mix_") for name in names):
        return _STATE_ELEMENT_BYTES * width * (keys.whole("wkv.head_size") + keys.whole("token_shift_count", 2))
    if any(name.startswith("shortconv.") for name in names):
        return _STATE_ELEMENT_BYTES * width * max(keys.whole("shortconv.l_cache") - 1, 0)
    inner, state = keys.whole("ssm.inner_size"), keys.whole("ssm.state_size")
    convolved = inner + 2 * keys.whole("ssm.group_count") * state
    return _STATE_ELEMENT_BYTES * (max(keys.whole("ssm.conv_kernel") - 1, 0) * convolved + inner * state)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file calls itself GGUF by its name."""
    return Path(path).suffix.lower() == ".gguf"
