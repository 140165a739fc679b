"""Networks that are known by their size alone: "40GB", or a mixture of experts by four numbers. Knows nothing of files; assumptions are
constants here.

The scaling rules give the right order of operations and activations, not the layers of any model: within a factor of two for FLUX.1-dev and
Llama-3.1-70B, which a test holds them to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from overflowml_core.activations import ASSUMED_TEXT_TOKENS
from overflowml_core.analytic import Attention, LanguageShape, Layer, Routed, language_model_profiles
from overflowml_core.analytic_images import DiffusionLayer, DiffusionShape, diffusion_profiles
from overflowml_core.errors import BadLimits, BadSize
from overflowml_core.facts import Block, Component, Experts, Network, Workload, digest, network_fingerprint
from overflowml_core.layout import align
from overflowml_core.units import format_bytes, parse_bytes
from overflowml_core.work import PassProfile

WEIGHT_BYTES = 2
"""Bytes of a weight where only the size of a model is known: bfloat16, in which models are published."""

HEAD_SIZE = 128
"""Features of an attention head: FLUX.1, Wan 2.x, Qwen-Image, Llama 3 and Qwen 3 all have 128. Widths are multiples of it."""

DIFFUSION_WIDTH_PER_BLOCK = 54
"""Width of a diffusion transformer over its number of blocks: FLUX.1-dev 3072 / 57 (Qwen-Image 51, SD3.5-large 64, Wan-14B 128)."""

DIFFUSION_SQUARES = 22
"""Weights of a block of a diffusion transformer over its squared width: FLUX.1-dev has 19 blocks of 36 and 38 of 15 (config.json)."""

DIFFUSION_SQUARES_PER_TOKEN = 12
"""Of these, what one token is multiplied with: four for attention, eight for the feed-forward; the rest is the other stream's, or
modulation."""

LANGUAGE_WIDTH_PER_BLOCK = 102
"""Width of a language model over its number of layers: Llama-3.1-70B 8192 / 80 (8B 128, 405B 130, Qwen2.5-72B 102)."""

LANGUAGE_SQUARES = 12.75
"""Weights of a layer over its squared width: attention 2.25 with keys and values for an eighth of the heads, feed-forward 3 * 3.5
(Llama-3.1-70B, config.json)."""

LANGUAGE_FEEDFORWARD = 3.5
"""Width of the feed-forward part over the model's width (Llama-3.1-70B: 28672 / 8192)."""

QUERIES_PER_KEY = 8
"""Heads of queries that share keys and values (Llama-3.1-70B: 64 / 8)."""

VOCABULARY = 128_256
"""Tokens of the vocabulary (Llama 3); embedding and output matrix hold one vector of the model's width for each, apart from the blocks."""

_LARGEST_WIDTH = 2**20
_LARGEST_GB = 2**60 / 10**9
_LARGEST_EXPERTS = 2**16
_LARGEST_BILLIONS = 10**6
_TINY_BYTES = 10**6
_SHOWN_CHARS = 40


def source_size(source: object, what: str = "size") -> int:
    """Read the size of a model: ``"40"`` and ``40`` are gigabytes (10**9 bytes), ``"40GB"`` and ``"40 GiB"`` what they say.

    Args:
        source: text or a number.
        what: what the size is, for the message.

    Raises:
        BadSize: it is no size, not finite, not above zero, or above 2**60 bytes; or below a megabyte, which no model is.
    """
    if isinstance(source, str):
        text = source.strip()
        plain = text.removesuffix(".").replace(".", "", 1)
        try:
            nbytes = parse_bytes(f"{text.removesuffix('.')}GB" if plain.isascii() and plain.isdigit() else text, what)
        except BadSize:
            raise BadSize(what, source[:_SHOWN_CHARS]) from None  # as it was written
    elif isinstance(source, (int, float)) and not isinstance(source, bool) and 0 < source <= _LARGEST_GB:  # false for NaN
        nbytes = round(source * 10**9)
    else:
        raise BadSize(what, _shown(source))
    if nbytes < _TINY_BYTES:
        raise BadSize(what, source, why="no model is smaller than a megabyte")
    return nbytes


def bare_network(nbytes: int, workload: Workload) -> Network:
    """A network of this many bytes, about which nothing else is known.

    A workload that names tokens means a language model, any other a diffusion transformer at 1024 x 1024 pixels or what the workload says.
    Text encoders and a VAE are not part of it.

    Args:
        nbytes: of all weights, two a weight.
        workload: what it will be asked to do.

    Raises:
        BadSize: it is smaller than a megabyte.
    """
    if nbytes < _TINY_BYTES:
        raise BadSize("size", nbytes, why="no model is smaller than a megabyte")
    language = workload.prompt_tokens is not None or workload.new_tokens is not None
    kind = "a language model" if language else "a diffusion transformer"
    note = f"a bare size: taken for {kind} of equal blocks in bfloat16"
    count = nbytes // WEIGHT_BYTES
    if language:
        width, depth, fixed = _language_size(count)
        inside = _Spread(nbytes - fixed * WEIGHT_BYTES, count - fixed, depth)
        layer = Layer(inside.count, inside.nbytes, _attention(width))
        profiles = language_model_profiles(_language_shape(layer, depth, width, int(LANGUAGE_FEEDFORWARD * width)), workload, note)
        return _network("a bare language model", inside, nbytes, count, ("BF16", None), profiles)
    width, depth = _size_for(count, lambda width: DIFFUSION_SQUARES * width**2, DIFFUSION_WIDTH_PER_BLOCK)
    inside = _Spread(nbytes, count, depth)
    each = inside.count * DIFFUSION_SQUARES_PER_TOKEN // DIFFUSION_SQUARES
    shape = DiffusionShape((DiffusionLayer(each, each, inside.nbytes, width, joint=True),) * depth, width, text_tokens=ASSUMED_TEXT_TOKENS)
    return _network("a bare diffusion transformer", inside, nbytes, count, ("BF16", None), diffusion_profiles(shape, workload, note))


def moe_network(
    total_b: float, active_b: float, experts: int, per_token: int, nbytes: int | None = None, workload: Workload | None = None
) -> Network:
    """A mixture of experts known by four numbers: ``plan 120 --moe 120 12 128 8``.

    Shared weights S and experts' weights E follow from S + E = total and S + E * per_token / experts = active.

    Args:
        total_b: all weights, in billions.
        active_b: weights that a token uses, in billions.
        experts: in each block.
        per_token: experts that a token is routed to.
        nbytes: of all weights; two a weight where it is not given.
        workload: what it will be asked to do; tokens alone count.

    Raises:
        BadLimits: the numbers contradict each other; the message holds them.
    """
    shared, routed = _solve(total_b, active_b, experts, per_token)
    total = shared + routed
    nbytes = total * WEIGHT_BYTES if nbytes is None else nbytes
    element = nbytes / total
    if not 1 / 16 <= element <= 8:
        raise BadLimits(
            f"{format_bytes(nbytes)} for {total_b:g} billion weights are {element:.3g} bytes a weight; "
            "give the size of the file, or leave it out"
        )
    width, depth, _ = _language_size(max(round(active_b * 1e9), 1))
    fixed = min(2 * VOCABULARY * width, shared // 2)
    inside = _Spread(nbytes - round(fixed * element), total - fixed, depth)
    one_count = routed // (depth * experts)
    one_bytes = min(round(one_count * element), inside.nbytes // experts)
    if one_bytes < 1:
        raise BadLimits(f"{total_b:g} billion weights in {depth} blocks of {experts} experts leave none for an expert; give fewer experts")
    layer = Layer(
        max(inside.count - one_count * experts, 0),
        inside.nbytes - one_bytes * experts,
        _attention(width),
        Routed(experts, per_token, one_count, one_bytes),
    )
    note = (
        f"a bare mixture of experts: {shared / 1e9:.3g} billion shared weights and {routed / 1e9:.4g} billion in experts, "
        f"spread evenly over {depth} blocks, {8 * element:.2g} bits a weight"
    )
    feedforward = max(round(one_count / (3 * width)), 1) * per_token
    profiles = language_model_profiles(_language_shape(layer, depth, width, feedforward), workload or Workload(), note)
    dtype = "F32" if element >= 3 else "BF16" if element >= 1.5 else "F8_E4M3" if element >= 0.75 else "F4"
    bank = Experts(experts, one_bytes, per_token)
    return _network(f"a bare mixture of experts ({total_b:g}B, {active_b:g}B active)", inside, nbytes, total, (dtype, bank), profiles)


def _shown(value: object) -> object:
    """A value for a message: Python refuses to write whole numbers of more than 4300 digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return "a number of more than 18 digits"
    return value[:_SHOWN_CHARS] if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class _Spread:
    """Bytes and weights of all blocks, shared out evenly; what cannot be shared stays outside."""

    all_bytes: int
    all_count: int
    depth: int

    @property
    def nbytes(self) -> int:
        return self.all_bytes // self.depth

    @property
    def count(self) -> int:
        return self.all_count // self.depth


def _solve(total_b: float, active_b: float, experts: int, per_token: int) -> tuple[int, int]:
    asked = f"--moe {' '.join(str(_shown(value)) for value in (total_b, active_b, experts, per_token))}"
    form = "give total and active weights in billions, experts, and experts a token uses, as in 120 12 128 8"
    for value in (total_b, active_b):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_BILLIONS:
            raise BadLimits(f"{asked}: {_shown(value)!r} is no number of billions above 0 and below a million; {form}")
    for count in (experts, per_token):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= _LARGEST_EXPERTS:
            raise BadLimits(f"{asked}: {_shown(count)!r} is no number of experts from 1 to {_LARGEST_EXPERTS}; {form}")
    if active_b > total_b:
        raise BadLimits(f"{asked}: {active_b:g} billion active weights are more than {total_b:g} billion in all; {form}")
    if per_token > experts:
        raise BadLimits(f"{asked}: a token cannot use {per_token} of {experts} experts; {form}")
    if per_token == experts:
        raise BadLimits(f"{asked}: a token that uses all {experts} experts makes a dense model; leave --moe out")
    routed = (total_b - active_b) / (1 - per_token / experts)
    shared = total_b - routed
    if shared < 0:
        least = total_b * per_token / experts
        raise BadLimits(
            f"{asked}: {per_token} of {experts} experts are at least {least:.4g} of {total_b:g} billion weights, "
            f"more than the {active_b:g} billion active ones; {form}"
        )
    total = max(round(total_b * 1e9), 1)
    return max(total - round(routed * 1e9), 0), min(round(routed * 1e9), total)


def _size_for(count: int, block_count: Callable[[int], float], width_per_block: int) -> tuple[int, int]:
    """The largest width whose blocks hold no more than this many weights, and the number of blocks."""
    low, high = 1, _LARGEST_WIDTH // HEAD_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        width = middle * HEAD_SIZE
        if block_count(width) * max(width / width_per_block, 1) <= count:
            low = middle
        else:
            high = middle - 1
    width = low * HEAD_SIZE
    return width, max(round(count / block_count(width)), 1)


def _language_size(count: int) -> tuple[int, int, int]:
    """Width, layers, and weights outside the layers of a dense model of this many weights."""
    width, _ = _size_for(
        count, lambda width: LANGUAGE_SQUARES * width**2 + 2 * VOCABULARY * LANGUAGE_WIDTH_PER_BLOCK, LANGUAGE_WIDTH_PER_BLOCK
    )
    fixed = min(2 * VOCABULARY * width, count // 2)
    return width, max(round((count - fixed) / (LANGUAGE_SQUARES * width**2)), 1), fixed


def _attention(width: int) -> Attention:
    heads = width // HEAD_SIZE
    return Attention(heads, HEAD_SIZE, HEAD_SIZE, 2 * max(heads // QUERIES_PER_KEY, 1) * HEAD_SIZE)


def _language_shape(layer: Layer, depth: int, width: int, feedforward: int) -> LanguageShape:
    head = VOCABULARY * width
    return LanguageShape((layer,) * depth, width, feedforward, head, head * WEIGHT_BYTES, VOCABULARY)


def _network(
    class_name: str, inside: _Spread, nbytes: int, count: int, kind: tuple[str, Experts | None], profiles: tuple[PassProfile, ...]
) -> Network:
    dtype, bank = kind
    slab = align(inside.nbytes)
    by_dtype = ((dtype, inside.nbytes),)
    blocks = tuple(
        Block(f"blocks.{i}", inside.count, inside.nbytes, slab, by_dtype, linear_count=inside.count, experts=bank)
        for i in range(inside.depth)
    )
    component = Component(
        name="model",
        class_name=class_name,
        blocks=blocks,
        resident_bytes=align(nbytes - inside.nbytes * inside.depth),
        resident_weight_count=count - inside.count * inside.depth,
        bytes_by_dtype=((dtype, nbytes),),
        phase="model",
        passes=sum(profile.count for profile in profiles),
        activation_bytes=max(profile.activation_bytes for profile in profiles),
        activation_source="analytic",
        fingerprint=digest([class_name, nbytes, count, inside.depth, None if bank is None else [bank.count, bank.nbytes, bank.per_token]]),
        profiles=profiles,
    )
    return Network((component,), f"{format_bytes(nbytes)} of weights", class_name, network_fingerprint((component,)))
