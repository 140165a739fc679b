"""What each layer of a GGUF model keeps of a sequence: keys and values, or a state. By its metadata and the names of its tensors.

Follows llama.cpp build 11434: ``llama_hparams`` (src/llama-hparams.cpp), ``llama_kv_cache`` (src/llama-kv-cache.cpp), ``create_memory``
(src/llama-model.cpp) and ``load_arch_hparams`` of each architecture (src/models).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from overflowml_core.inspect.gguf_keys import Keys

STATE_ELEMENT_BYTES = 4
"""llama.cpp keeps recurrent states in float32."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """How an architecture's layers slide where the file does not say.

    Attributes:
        period: of how many layers one sees the whole context; 0 where none does.
        full_first: that one is the first of them, not the last.
        tokens: the window where the file names none.
        fixed: the window is this one whatever the file says.
    """

    period: int
    full_first: bool = False
    tokens: int = 0
    fixed: bool = False


_WINDOWS = {
    "afmoe": _Windows(4),
    "cohere2": _Windows(4),
    "cohere2moe": _Windows(4, full_first=True),
    "exaone-moe": _Windows(4, tokens=128),
    "exaone4": _Windows(4, tokens=4096),
    "gemma2": _Windows(2, tokens=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gpt-oss": _Windows(2),
    "laguna": _Windows(4, full_first=True),
    "lfm2": _Windows(0),
    "llama4": _Windows(4, tokens=8192, fixed=True),
    "mellum": _Windows(4),
    "muse-glimmer": _Windows(4),
    "olmo2": _Windows(4),
    "plamo3": _Windows(8),
    "smallthinker": _Windows(4, full_first=True, tokens=4096, fixed=True),
}
"""By architecture: ``load_swa_pattern`` and ``n_swa`` in src/models of llama.cpp. Where nobody says, all layers see the whole context: more
memory, never less. llama.cpp does so itself with architectures that are not here (Mistral, Qwen 2, Phi 3)."""

_EXAONE4_SLIDING_LAYERS = 64
"""EXAONE 4.0 of 32B slides, the smaller one does not (src/models/exaone4.cpp)."""

_GEMMA3N_OWN_LAYERS = 20
"""Layers of Gemma 3n with a cache of their own; the others use theirs (src/models/gemma3n.cpp)."""

_RECURRENT = ("ssm_", "time_mix_", "shortconv.")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What a layer keeps of one sequence.

    Attributes:
        key_count, value_count: elements that a token leaves in the cache; latent attention leaves keys alone.
        key_size, value_size: of these, features of one head; 0 where the layer has no attention.
        window: tokens that a query sees at most; 0 where it sees all.
        state_bytes: what is kept of a sequence of any length (recurrent layers).
    """

    key_count: int = 0
    value_count: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int = 0
    state_bytes: int = 0


def layer_caches(keys: Keys, width: int, names: Mapping[int, Collection[str]]) -> dict[int, LayerCache]:
    """What each layer keeps.

    Args:
        keys: the metadata.
        width: features of a token between the layers.
        names: by the number of each layer, its tensors' names inside it ("attn_k.weight").

    Raises:
        BadCheckpoint: a key is no count, or there are not as many as layers.
    """
    heads, kv_heads = keys.each("attention.head_count"), _kv_heads(keys)
    first_heads = next((count for count in heads if count), 1)
    sizes = tuple(keys.whole(f"attention.{kind}_length") or width // first_heads for kind in ("key", "value"))
    window, slides = _windows(keys)
    sliding_sizes = tuple(keys.whole(f"attention.{kind}_length_swa", size) for kind, size in zip(("key", "value"), sizes, strict=True))
    latent, indexer = _latent(keys), keys.whole("attention.indexer.key_length")
    running = keys.layers - keys.whole("nextn_predict_layers")
    own = min(_own_layers(keys), running)
    states = _States(keys)
    found: dict[int, LayerCache] = {}
    for number, members in names.items():
        recurrent = any(name.startswith(_RECURRENT) for name in members)
        state = states.nbytes(members, heads[number]) if recurrent and number < running else 0
        seen = window if slides[number] else 0
        key_size, value_size = sliding_sizes if seen else sizes
        if not heads[number] or not _makes_keys(members, recurrent):
            found[number] = LayerCache(window=seen, state_bytes=state)
            continue
        key_count, value_count = kv_heads[number] * key_size, kv_heads[number] * value_size
        if latent:
            key_count, value_count = (latent.size * kv_heads[number] if latent.by_head else latent.size), 0
        if key_count:  # keys of an indexer (sparse attention) are kept beside those of the attention itself
            key_count += indexer
        kept = (key_count, value_count) if number < own else (0, 0)
        found[number] = LayerCache(*kept, key_size, value_size, seen, state)
    return found


def _kv_heads(keys: Keys) -> tuple[int, ...]:
    return keys.each("attention.head_count_kv") if keys.has("attention.head_count_kv") else keys.each("attention.head_count")


@dataclass(frozen=True, slots=True)
class _Latent:
    """What latent attention keeps of a token: the latent and the rotary part of the key; values are made from the same latent."""

    size: int
    by_head: bool


def _latent(keys: Keys) -> _Latent | None:
    if not (keys.whole("attention.key_length_mla") and keys.whole("attention.value_length_mla")):
        return None
    said = keys.whole("attention.key_length")
    return _Latent(said, True) if said else _Latent(keys.whole("attention.kv_lora_rank") + keys.whole("rope.dimension_count", 64), False)


def _makes_keys(names: Collection[str], recurrent: bool) -> bool:
    made = "attn_k.weight" in names or any(name.startswith("attn_kv_") for name in names)
    return made or ("attn_qkv.weight" in names and not recurrent)


def _own_layers(keys: Keys) -> int:
    """Layers before those that use the cache of an earlier one."""
    if keys.architecture == "gemma3n":
        return _GEMMA3N_OWN_LAYERS
    return keys.layers - keys.whole("attention.shared_kv_layers")


def _windows(keys: Keys) -> tuple[int, list[bool]]:
    """The sliding window in tokens, and which layers slide."""
    known = _WINDOWS.get(keys.architecture, _Windows(1))
    if keys.architecture == "exaone4" and keys.layers != _EXAONE4_SLIDING_LAYERS:
        known = _Windows(1)
    said = keys.whole("attention.sliding_window")
    window = said if keys.has("attention.sliding_window") and not (known.fixed and said) else known.tokens
    if not window:
        return 0, [False] * keys.layers
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) >= keys.layers:
        return window, [bool(slide) for slide in pattern]
    period = pattern if isinstance(pattern, int) and not isinstance(pattern, bool) else known.period
    if period < 1:
        return window, [period == 0] * keys.layers
    full = 0 if known.full_first else period - 1
    return window, [number % period != full for number in range(keys.layers)]


class _States:
    """Sizes of recurrent layers: the ends of their convolutions and their states (``n_embd_r`` and ``n_embd_s``)."""

    def __init__(self, keys: Keys) -> None:
        width = keys.whole("embedding_length")
        kernel = max(keys.whole("ssm.conv_kernel") - 1, 0)
        inner, state = keys.whole("ssm.inner_size"), keys.whole("ssm.state_size")
        self._time_mix = width * (keys.whole("wkv.head_size") + keys.whole("token_shift_count", 2))
        self._convolution = width * max(keys.whole("shortconv.l_cache") - 1, 0)
        self._selective = kernel * (inner + 2 * keys.whole("ssm.group_count") * state) + inner * state
        delta = keys.whole("kda.head_dim")
        self._delta_head = delta * (3 * kernel + delta)

    def nbytes(self, names: Collection[str], heads: int) -> int:
        """Bytes of a layer with these tensors."""
        if any(name.startswith("time_mix_") for name in names):
            return STATE_ELEMENT_BYTES * self._time_mix
        if any(name.startswith("shortconv.") for name in names):
            return STATE_ELEMENT_BYTES * self._convolution
        return STATE_ELEMENT_BYTES * (heads * self._delta_head or self._selective)
