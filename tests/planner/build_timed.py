"""Networks whose passes are known, and machines whose rates are: seconds that can be reckoned by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from overflowml_core.facts import (
    Block,
    BlockWork,
    Component,
    ComputeRate,
    Experts,
    Machine,
    Network,
    PassProfile,
    Rates,
    Variant,
    Work,
    network_fingerprint,
)
from overflowml_core.formats import Format
from tests.planner.build import GIB, MIB, component, machine, network

FLOP_PER_S = 1e12
MEMORY_BYTES_PER_S = 1e12
LINK_BYTES_PER_S = 1e9
DISK_BYTES_PER_S = 0.25e9

RATES = Rates(
    LINK_BYTES_PER_S,
    LINK_BYTES_PER_S,
    DISK_BYTES_PER_S,
    "measured",
    pageable_h2d_bytes_per_s=0.5e9,
    memory_bytes_per_s=MEMORY_BYTES_PER_S,
    compute=(ComputeRate("matmul", "BF16", FLOP_PER_S),),
)

FP8 = Format("fp8", 8, "minimal", 0.02)
INT8 = Format("int8", 8, "minimal", 0.01, decode_bytes_per_s=1e12)
INT4 = Format("int4", 4, "any", 0.1)
ALL = frozenset({"formats", "experts", "formats of experts", "devices", "variants"})
ONE_DEVICE = ALL - {"devices"}


def work(seconds: float, weight_bytes: int = 0) -> Work:
    """A product that takes so long on ``RATES``, whatever it weighs."""
    return Work("matmul", "BF16", round(seconds * FLOP_PER_S), weight_bytes, weight_bytes)


def timed(
    name: str,
    sizes: Sequence[int],
    seconds: Sequence[float],
    passes: int = 1,
    *,
    linear: bool = False,
    outside_s: float = 0.0,
    **changes: Any,
) -> Component:
    """A component whose blocks have these sizes and compute so long in each pass."""
    made = component(name, sizes, **{"passes": passes, **changes})
    works = tuple(BlockWork((work(s, size),), 0) for s, size in zip(seconds, sizes, strict=True))
    outside = (work(outside_s),) if outside_s else ()
    profile = PassProfile("denoise", passes, made.activation_bytes, works, outside, source="traced")
    blocks = tuple(replace(b, linear_count=b.weight_count if linear else 0) for b in made.blocks)
    return replace(made, blocks=blocks, profiles=(profile,))


def on(rates: Rates = RATES, **options: Any) -> Machine:
    """A machine with these rates."""
    return replace(machine(**options), rates=rates)


def language(blocks: int = 8, block_bytes: int = 256 * MIB, tokens: int = 16, **changes: Any) -> Network:
    """A language model whose tokens are bound by memory."""
    made = component("model", [block_bytes] * blocks, **changes)
    prefill, token = BlockWork((work(0.02, block_bytes),)), BlockWork((work(1e-5, block_bytes),))
    profiles = (
        PassProfile("prefill", 1, made.activation_bytes, (prefill,) * blocks, source="traced"),
        PassProfile("token", tokens, made.activation_bytes, (token,) * blocks, source="traced"),
    )
    kept = tuple(replace(b, linear_count=b.weight_count) for b in made.blocks)
    return network(replace(made, blocks=kept, profiles=profiles, passes=tokens + 1), name="Llama")


def mixture(blocks: int = 4, experts: int = 64, expert_bytes: int = 8 * MIB, per_token: int = 2, dense_bytes: int = 64 * MIB) -> Network:
    """A mixture of experts."""
    size = dense_bytes + experts * expert_bytes
    bank = Experts(experts, expert_bytes, per_token)
    row = tuple(Block(f"layers.{i}", size // 2, size, size, (("BF16", size),), linear_count=size // 2, experts=bank) for i in range(blocks))
    active = dense_bytes + per_token * expert_bytes
    profiles = (
        PassProfile("prefill", 1, 16 * MIB, (BlockWork((work(0.01, size),)),) * blocks, source="traced"),
        PassProfile("token", 32, 16 * MIB, (BlockWork((work(1e-5, active),)),) * blocks, source="traced"),
    )
    made = Component("model", "Moe", row, 32 * MIB, 16 * MIB, (("BF16", 32 * MIB + blocks * size),), "model", 33, profiles=profiles)
    return Network((made,), "moe", "Moe", network_fingerprint((made,)))


def vae(as_is: int = 4 * GIB, sliced: int = 2 * GIB, tiled: int = GIB // 2, weights: int = 100 * MIB) -> Component:
    """A VAE that slicing helps without loss, and tiling with some."""
    made = timed("vae", [weights], [0.1], activations=as_is)
    (profile,) = made.profiles
    ways = (("tiling", False, tiled), ("slicing", True, sliced))
    variants = tuple(Variant(name, lossless, (replace(profile, activation_bytes=nbytes),)) for name, lossless, nbytes in ways)
    return replace(made, profiles=(replace(profile, activation_bytes=as_is),), variants=variants)
