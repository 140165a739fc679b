"""The ways of running a model in llama.cpp within a budget, side by side, and which of them is taken. Prints nothing.

The order is that of llama.cpp's own ``--fit`` (common/fit.cpp): everything on the device; else all layers there and as few experts on the
CPU as must be; else as many layers as fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from overflowml_core.units import format_bytes
from overflowml_llamacpp.memory import CACHE_TYPES, CacheType, Memory, Placement, fitting_types, memory_of
from overflowml_llamacpp.model import LlamaModel
from overflowml_llamacpp.pace import token_seconds
from overflowml_llamacpp.setting import Setting

ALL, EXPERTS, PART, LAYERS, CPU = "device", "experts", "part of a layer", "layers", "cpu"
"""Kinds of ways, the simplest first."""

_KINDS = (ALL, EXPERTS, PART, LAYERS, CPU)
_WORTH = 1.01
"""So many times as fast a way must be to be taken before a simpler one; a cache of fewer bits costs precision, and must be worth more."""
_WORTH_CACHE = 1.03


@dataclass(frozen=True, slots=True)
class Way:
    """One way that fits.

    Attributes:
        kind: one of the constants of this file.
        placement: where everything is.
        memory: what it takes.
        token_s: predicted seconds of a token; None where a rate is not known.
        cost: what ways are compared by: these seconds, or, where those of any way are not known, bytes that a token reads in RAM.
    """

    kind: str
    placement: Placement
    memory: Memory
    token_s: float | None
    cost: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A way that does not fit: its kind, the cache's type, bytes that it takes of the device and bytes that there are."""

    kind: str
    cache: CacheType
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What is taken, and what else there is.

    Attributes:
        way: what is taken.
        whole_layers: the best way that needs whole layers alone, which is all that Ollama can be told.
        ways: all that fit, the fastest first.
        refused: what does not.
        reasons: why this way.
        warnings: what the user should know.
    """

    way: Way
    whole_layers: Way
    ways: tuple[Way, ...]
    refused: tuple[Refused, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def choose(model: LlamaModel, setting: Setting, tokens: int, cache_names: Sequence[str]) -> Choice:
    """Find the ways that fit and take one.

    Args:
        model: what shall run.
        setting: where.
        tokens: of the padded context.
        cache_names: types that the cache may have, the most precise first; others are shown beside them.
    """
    search = _Search(model, setting, tokens)
    kinds = fitting_types(model.layers, CACHE_TYPES.values())
    allowed = [kind for name in cache_names for kind in kinds if kind.name == name]
    warnings = tuple(
        f"a cache of {name} is left out: its groups of {CACHE_TYPES[name].group_count} do not divide the heads"
        for name in cache_names
        if CACHE_TYPES[name] not in kinds
    )
    allowed = allowed or [CACHE_TYPES["f16"]]
    shown = [*allowed, *(kind for kind in kinds if kind not in allowed and kind.name == "q8_0")]
    found = {kind: list(search.ways(kind)) for kind in shown}
    chosen = _best(found[allowed[0]])
    for kind in allowed[1:]:
        other = _best(found[kind])
        if other.cost * _WORTH_CACHE < chosen.cost:
            chosen = other
    ways = [way for options in found.values() for way in options]
    same = [way for way in found[chosen.placement.cache] if way.kind in (ALL, LAYERS, CPU)]
    fitting = {(way.kind, way.placement.cache) for way in ways}
    refused = [no for kind in allowed for no in search.refused(kind) if (no.kind, kind) not in fitting]
    # Other caches are shown where they change something alone.
    listed = [way for way in ways if way.placement.cache in allowed or way.cost * _WORTH_CACHE < chosen.cost]
    return Choice(
        way=chosen,
        whole_layers=_best(same),
        ways=tuple(sorted(listed, key=lambda way: (way.cost, _KINDS.index(way.kind)))),
        refused=tuple(refused),
        reasons=(*_reasons(model, setting, chosen, ways), *_cache_reasons(chosen, ways, allowed)),
        warnings=warnings,
    )


def _best(ways: Sequence[Way]) -> Way:
    best = min(ways, key=lambda way: _KINDS.index(way.kind))
    for way in sorted(ways, key=lambda way: _KINDS.index(way.kind)):
        if way.cost * _WORTH < best.cost:
            best = way
    return best


class _Search:
    """Looks for the largest part of a model that a budget holds."""

    def __init__(self, model: LlamaModel, setting: Setting, tokens: int) -> None:
        self._model, self._setting, self._tokens = model, setting, tokens
        self._total = len(model.layers)
        rates = setting.device_rates
        has_rate = rates is not None and rates.memory_bytes_per_s > 0
        self._is_timed = setting.cpu_rates.memory_bytes_per_s > 0 and (has_rate or not setting.device_bytes)
        self._moe = [number + 1 for number, layer in enumerate(model.layers) if layer.experts]

    def ways(self, cache: CacheType) -> Iterator[Way]:
        """All ways that fit, with this cache; the CPU's is always among them."""
        yield self._way(CPU, Placement(0, 0, (), cache))
        if not self._setting.device_bytes:
            return
        whole = Placement(self._total + 1, 0, (), cache)
        if self._fits(whole):
            yield self._way(ALL, whole)
            return
        experts = self._fewest_experts(cache)
        if experts is not None:
            yield self._way(EXPERTS, experts)
            finer = self._part_of_a_layer(experts)
            if finer is not None:
                yield self._way(PART, finer)
        elif self._moe:
            dense = self._most_layers(cache, self._total)
            if dense is not None:
                yield self._way(EXPERTS, dense)
        layers = self._most_layers(cache, 0)
        if layers is not None:
            yield self._way(LAYERS, layers)

    def refused(self, cache: CacheType) -> Iterator[Refused]:
        """What each way would take at least."""
        if not self._setting.device_bytes:
            return
        least = [(ALL, Placement(self._total + 1, 0, (), cache))]
        least += [(EXPERTS, Placement(self._total + 1, self._total, (), cache))] if self._moe else []
        least += [(LAYERS, Placement(1, 0, (), cache))]
        for kind, placement in least:
            needed = self._memory(placement).device_bytes
            if needed > self._setting.device_bytes:
                yield Refused(kind, cache, needed, self._setting.device_bytes)

    def _memory(self, placement: Placement) -> Memory:
        return memory_of(self._model, placement, self._tokens, self._setting.context_bytes)

    def _fits(self, placement: Placement) -> bool:
        return self._memory(placement).device_bytes <= self._setting.device_bytes

    def _way(self, kind: str, placement: Placement) -> Way:
        memory = self._memory(placement)
        token_s = token_seconds(memory, self._setting)
        cost = token_s if self._is_timed and token_s is not None else float(memory.host_read_bytes)
        return Way(kind, placement, memory, token_s, cost)

    def _fewest_experts(self, cache: CacheType) -> Placement | None:
        """All layers on the device, and the smallest ``--n-cpu-moe`` with which that fits."""
        for count in self._moe:  # a layer without experts changes nothing
            placement = Placement(self._total + 1, count, (), cache)
            if self._fits(placement):
                return placement
        return None

    def _part_of_a_layer(self, placement: Placement) -> Placement | None:
        """The same with those tensors of the last layer kept on the CPU whose absence leaves the least room."""
        last = placement.cpu_moe - 1
        tensors = self._model.layers[last].experts
        before = max((count for count in self._moe if count < placement.cpu_moe), default=0)
        ways = [subset for size in range(1, len(tensors)) for subset in combinations(tensors, size)]
        for subset in sorted(ways, key=lambda subset: sum(nbytes for _, nbytes in subset)):
            finer = Placement(placement.gpu_layers, before, tuple(name for name, _ in subset), placement.cache)
            if self._fits(finer):
                return finer
        return None

    def _most_layers(self, cache: CacheType, cpu_moe: int) -> Placement | None:
        for count in range(self._total + 1, 0, -1):
            placement = Placement(count, cpu_moe, (), cache)
            if self._fits(placement):
                return placement
        return None


def _reasons(model: LlamaModel, setting: Setting, chosen: Way, ways: Sequence[Way]) -> Iterator[str]:
    memory, budget = chosen.memory, format_bytes(setting.device_bytes)
    if chosen.kind == CPU:
        if setting.device_bytes:
            yield f"nothing that {budget} hold makes a token faster, so the device is left alone"
        return
    if chosen.kind == ALL:
        yield f"everything fits: {format_bytes(memory.device_bytes)} of {budget}"
        return
    yield f"all of it does not fit into {budget}"
    if chosen.kind in (EXPERTS, PART):
        count, per_token = model.experts
        read = format_bytes(memory.host_read_bytes)
        yield f"a token reads {per_token} of {count} experts and all of the rest, so the rest comes first; {read} a token are read in RAM"
    slower = next((way for way in ways if way.kind == LAYERS and way.placement.cache == chosen.placement.cache), None)
    if chosen.kind in (EXPERTS, PART) and slower is not None and slower.token_s and chosen.token_s:
        longer = slower.token_s / chosen.token_s
        yield f"whole layers (-ngl {slower.placement.gpu_layers}) would take {longer:.2f} times as long a token"


def _cache_reasons(chosen: Way, ways: Sequence[Way], allowed: Sequence[CacheType]) -> Iterator[str]:
    if chosen.placement.cache in allowed[1:]:
        yield f"a cache of {chosen.placement.cache.name} is worth its loss of precision: fewer weights leave the device for it"
    other = min((way for way in ways if way.placement.cache not in allowed), key=lambda way: way.cost, default=None)
    if other is not None and other.token_s and chosen.token_s and other.cost * _WORTH_CACHE < chosen.cost:
        faster = chosen.token_s / other.token_s
        yield f"a cache of {other.placement.cache.name} would make a token {faster:.2f} times as fast and less precise: --kv auto takes it"
