"""Networks as JSON, for the cache of profiles: written once, read back typed and bounded. Knows nothing of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Block, Component, Experts, Linear, Network
from overflowml_core.work import WORK_KINDS, BlockWork, PassProfile, Variant, Work

NETWORK_SCHEMA = 4
"""Version of the JSON form. A profile of another version is made again, so it changes with every field."""

LARGEST_NETWORK_CHARS = 256 * 2**20
_LARGEST_COUNT = 2**80  # floating-point operations of a whole pass may pass 2**60
_MOST_ITEMS = 1_000_000
_T = TypeVar("_T")


class _Malformed(Exception):
    """Something in the text is no network; the caller answers with None."""


def network_to_json(network: Network) -> str:
    """A network as JSON. Equal works of blocks are written once: a transformer has hundreds of equal blocks in every kind of pass."""
    table: dict[BlockWork, int] = {}
    document = {
        "schema": NETWORK_SCHEMA,
        "source": network.source,
        "class_name": network.class_name,
        "fingerprint": network.fingerprint,
        "components": [_component(component, table) for component in network.components],
    }
    document["works"] = [[[_work(w) for w in b.works], b.activation_bytes, b.calls] for b in table]
    return json.dumps(document, separators=(",", ":"))


def _component(component: Component, table: dict[BlockWork, int]) -> dict[str, Any]:
    return {
        "name": component.name,
        "class_name": component.class_name,
        "blocks": [_block(block) for block in component.blocks],
        "resident_bytes": component.resident_bytes,
        "resident_weight_count": component.resident_weight_count,
        "bytes_by_dtype": component.bytes_by_dtype,
        "phase": component.phase,
        "passes": component.passes,
        "activation_bytes": component.activation_bytes,
        "activation_source": component.activation_source,
        "fingerprint": component.fingerprint,
        "profiles": [_profile(profile, table) for profile in component.profiles],
        "variants": [[v.name, v.lossless, [_profile(profile, table) for profile in v.profiles]] for v in component.variants],
    }


def _block(block: Block) -> list[Any]:
    return [
        block.name,
        block.weight_count,
        block.stored_bytes,
        block.slab_bytes,
        block.bytes_by_dtype,
        block.tied_to,
        block.keep_format,
        block.linear_count,
        None if block.experts is None else _bank(block.experts),
        [_block(leaf) for leaf in block.leaves],
        _linears(block.linears),
    ]


def _linears(linears: tuple[Linear, ...]) -> list[list[Any]]:
    return [[linear.rows, linear.columns, linear.dtype, linear.count] for linear in linears]


def _bank(experts: Experts) -> list[Any]:
    # Heat belongs to what a model was asked, not to the model: it is kept apart and filled in by whoever plans.
    return [experts.count, experts.nbytes, experts.per_token, experts.dense_bytes, experts.separable, _linears(experts.matrices)]


def _work(work: Work) -> list[Any]:
    return [work.kind, work.dtype, work.flop, work.traffic_bytes, work.weight_bytes, work.calls, work.signature]


def _profile(profile: PassProfile, table: dict[BlockWork, int]) -> list[Any]:
    blocks = [table.setdefault(block, len(table)) for block in profile.blocks]
    outside = [_work(work) for work in profile.outside]
    sizes = [profile.count, profile.activation_bytes, profile.cache_bytes]
    return [profile.name, sizes, blocks, outside, profile.source, profile.note]


def network_from_json(text: str) -> Network | None:
    """The network in a text that :func:`network_to_json` wrote; None for anything else, whatever it is."""
    if len(text) > LARGEST_NETWORK_CHARS:
        return None
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("schema") != NETWORK_SCHEMA:
            return None
        return _read_network(document)
    except (_Malformed, OverflowmlError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None


def _read_network(document: Mapping[str, Any]) -> Network:
    table = tuple(
        BlockWork(tuple(_read_work(w) for w in _list(works)), _count(activation_bytes), _count(calls))
        for works, activation_bytes, calls in _list(document["works"])
    )
    return Network(
        components=tuple(_read_component(part, table) for part in _list(document["components"])),
        source=_is(str, document["source"]),
        class_name=_is(str, document["class_name"]),
        fingerprint=_is(str, document["fingerprint"]),
    )


def _read_component(part: Mapping[str, Any], table: tuple[BlockWork, ...]) -> Component:
    return Component(
        name=_is(str, part["name"]),
        class_name=_is(str, part["class_name"]),
        blocks=tuple(_read_block(block) for block in _list(part["blocks"])),
        resident_bytes=_count(part["resident_bytes"]),
        resident_weight_count=_count(part["resident_weight_count"]),
        bytes_by_dtype=_read_dtypes(part["bytes_by_dtype"]),
        phase=_is(str, part["phase"]),
        passes=_count(part["passes"]),
        activation_bytes=_count(part["activation_bytes"]),
        activation_source=_is(str, part["activation_source"]),
        fingerprint=_is(str, part["fingerprint"]),
        profiles=tuple(_read_profile(profile, table) for profile in _list(part["profiles"])),
        variants=tuple(
            Variant(_is(str, name), _is(bool, lossless), tuple(_read_profile(profile, table) for profile in _list(profiles)))
            for name, lossless, profiles in _list(part["variants"])
        ),
    )


def _read_block(block: list[Any]) -> Block:
    name, weight_count, stored_bytes, slab_bytes, dtypes, tied_to, keep_format, linear_count, experts, leaves, linears = _list(block)
    return Block(
        name=_is(str, name),
        weight_count=_count(weight_count),
        stored_bytes=_count(stored_bytes),
        slab_bytes=_count(slab_bytes),
        bytes_by_dtype=_read_dtypes(dtypes),
        tied_to=None if tied_to is None else _is(str, tied_to),
        keep_format=_is(bool, keep_format),
        linear_count=_count(linear_count),
        experts=None if experts is None else _read_bank(experts),
        leaves=tuple(_read_block(leaf) for leaf in _list(leaves)),
        linears=_read_linears(linears),
    )


def _read_bank(bank: list[Any]) -> Experts:
    count, nbytes, per_token, dense_bytes, separable, matrices = _list(bank)
    shapes = _read_linears(matrices)
    return Experts(_count(count), _count(nbytes), _count(per_token), _count(dense_bytes), _is(bool, separable), matrices=shapes)


def _read_linears(linears: object) -> tuple[Linear, ...]:
    return tuple(Linear(_count(rows), _count(columns), _is(str, dtype), _count(count)) for rows, columns, dtype, count in _list(linears))


def _read_dtypes(pairs: object) -> tuple[tuple[str, int], ...]:
    return tuple((_is(str, name), _count(nbytes)) for name, nbytes in _list(pairs))


def _read_work(work: list[Any]) -> Work:
    kind, dtype, flop, traffic_bytes, weight_bytes, calls, signature = _list(work)
    if kind not in WORK_KINDS:
        raise _Malformed
    return Work(kind, _is(str, dtype), _count(flop), _count(traffic_bytes), _count(weight_bytes), _count(calls), _is(str, signature))


def _read_profile(profile: list[Any], table: tuple[BlockWork, ...]) -> PassProfile:
    name, (count, activation_bytes, cache_bytes), blocks, outside, source, note = _list(profile)
    return PassProfile(
        name=_is(str, name),
        count=_count(count),
        activation_bytes=_count(activation_bytes),
        blocks=tuple(table[_count(index)] for index in _list(blocks)),
        outside=tuple(_read_work(work) for work in _list(outside)),
        cache_bytes=_count(cache_bytes),
        source=_is(str, source),
        note=_is(str, note),
    )


def _list(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise _Malformed
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        raise _Malformed
    return value


def _is(kind: type[_T], value: object) -> _T:
    if not isinstance(value, kind):
        raise _Malformed
    return value
