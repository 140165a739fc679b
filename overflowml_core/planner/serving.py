"""A language model over several machines: how many it takes, who holds which layers, and what a token takes. Launches nothing.

Note [what is planned]. An engine that serves one model on several machines (vLLM) knows two ways to cut it. Tensor parallelism cuts every
layer over some GPUs, which must be alike and close, for they exchange results twice a layer. Pipeline parallelism gives each stage some
whole layers; stages may be unlike where their layers are counted out (``VLLM_PP_LAYER_PARTITION``), and every stage has the same number of
GPUs. So stages here are GPUs of one machine, all of one size, and layers follow the memory that stages have.

Note [memory]. The engine takes a share of each GPU (``UTILIZATION``, its own default) for weights, activations and keys and values; what
its process takes beside that must fit into the rest. Embedding and head are counted whole on the first and on the last stage: the engine
holds tied ones twice. What does not fit may wait in RAM (``--cpu-offload-gb``) and is copied for every pass.

Note [time]. A token goes through the stages one after the other, each at the roofline of its GPUs over the number that share a layer; bytes
that wait in RAM come over the link for every token, each GPU its own part at once. Exchanges within a layer and hand-overs between stages
carry few bytes for a token, and are counted by their latency alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd, inf

from overflowml_core.errors import DoesNotFit, OverflowmlError
from overflowml_core.facts import Component, Network
from overflowml_core.machine import Kind, Machine, Rates
from overflowml_core.planner.cost import Costs
from overflowml_core.units import format_bytes
from overflowml_core.work import PassProfile

UTILIZATION = 0.9
"""Of a GPU's memory: vLLM's default for ``--gpu-memory-utilization``."""

_EXCHANGE_S, _HANDOVER_S = 20e-6, 100e-6
"""Latency of a sum over the GPUs of a stage, of which a layer has two, and of handing a token to the next stage. Assumed: an all-reduce of
some kilobytes takes 10 to 30 us over NVLink or PCIe, a message between machines 50 to 200 us."""

_GIB = 2**30
_MOST_STAGES = 128


@dataclass(frozen=True, slots=True)
class Stage:
    """GPUs that hold the same layers, each a part of every one.

    Attributes:
        kind: name of the machines that it is on.
        machine: which of all machines that are used, from 0.
        gpus: their indices on that machine.
        layers: how many it holds.
        gpu_bytes: taken of each GPU, offloaded weights not among them.
        offloaded_bytes: weights of each GPU that wait in RAM.
    """

    kind: str
    machine: int
    gpus: tuple[int, ...]
    layers: int
    gpu_bytes: int
    offloaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Serving:
    """One way of running a model on several machines.

    Attributes:
        machines: (name, how many of them), in the order of the stages; the first one is the head.
        stages: in the order in which a token goes through them.
        gpu_memory_bytes: of the smallest GPU that is used.
        token_s: of one token of one sequence; None where a rate is not known.
    """

    machines: tuple[tuple[str, int], ...]
    stages: tuple[Stage, ...]
    gpu_memory_bytes: int
    token_s: float | None

    @property
    def machine_count(self) -> int:
        """Machines that it takes."""
        return sum(count for _, count in self.machines)

    @property
    def tensor_parallel(self) -> int:
        """GPUs that share each layer."""
        return len(self.stages[0].gpus)

    @property
    def pipeline_parallel(self) -> int:
        """Stages."""
        return len(self.stages)

    @property
    def offload_gib(self) -> int:
        """GiB of each GPU's weights that wait in RAM, rounded up: what ``--cpu-offload-gb`` takes."""
        return max(-(-stage.offloaded_bytes // _GIB) for stage in self.stages)


@dataclass(frozen=True, slots=True)
class _Model:
    layers: tuple[int, ...]
    ends_bytes: int
    cache_bytes: int
    activation_bytes: int
    token: PassProfile | None
    heads: int | None


def plan_serving(network: Network, kinds: Sequence[Kind], heads: int | None = None) -> Serving:
    """The fewest machines that hold a model, and the fastest way of using them; where no number of them does, the fastest way with weights
    in RAM.

    Args:
        network: with one component, a language model, described at the workload.
        kinds: what there is.
        heads: attention heads of the model, which the GPUs that share a layer divide; None where nobody knows: then powers of two do.

    Raises:
        DoesNotFit: all of them together do not hold it, weights in RAM included.
        OverflowmlError: it is no model that is cut by its layers, or no machine has a GPU.
    """
    model = _model_of(network, heads)
    usable = [kind for kind in kinds if kind.machine.accelerators and not kind.machine.compute.unified]
    if not usable:
        raise OverflowmlError("no machine has a GPU with memory of its own, which engines for several machines need; name one in the file")
    most = sum(kind.count for kind in usable)
    for count in range(1, most + 1):
        found = _ways(model, usable, count, offloads=False)
        if found:
            return min(found, key=_rank)
    # Every further GPU takes some of what would come over a link for each token.
    found = [way for count in range(1, most + 1) for way in _ways(model, usable, count, offloads=True)]
    if found:
        return min(found, key=lambda way: (*_rank(way), way.machine_count))
    weights = format_bytes(sum(model.layers) + model.ends_bytes)
    raise DoesNotFit(f"{network.class_name}: {weights} of weights do not fit on all {most} machines; add some, or ones with more memory")


def fits_one(network: Network, kinds: Sequence[Kind], heads: int | None = None) -> tuple[tuple[str, Serving | None], ...]:
    """For each kind, the fewest machines of it alone that hold the model without weights in RAM; None where all of them do not."""
    model = _model_of(network, heads)
    answers = []
    for kind in kinds:
        usable = bool(kind.machine.accelerators) and not kind.machine.compute.unified
        ways = (_best(model, (replace(kind, count=count),), False) for count in range(1, kind.count + 1)) if usable else iter(())
        answers.append((kind.name, next((way for way in ways if way is not None), None)))
    return tuple(answers)


def _model_of(network: Network, heads: int | None) -> _Model:
    component = _language_model(network)
    profiles = {profile.name: profile for profile in component.profiles}
    cache = max((profile.cache_bytes for profile in component.profiles), default=0)
    peak = max((profile.activation_bytes - profile.cache_bytes for profile in component.profiles), default=component.activation_bytes)
    layers = tuple(block.slab_bytes for block in component.blocks)
    return _Model(layers, component.resident_bytes, cache, max(0, peak), profiles.get("token"), heads)


def _language_model(network: Network) -> Component:
    if len(network.components) != 1 or len(network.components[0].blocks) < 2:
        raise OverflowmlError(
            f"{network.source or network.class_name}: {len(network.components)} components; engines for several machines serve language "
            "models alone. For pictures run one pipeline on each machine"
        )
    return network.components[0]


def _ways(model: _Model, kinds: Sequence[Kind], count: int, offloads: bool) -> list[Serving]:
    return [way for chosen in _choices(kinds, count) if (way := _best(model, chosen, offloads)) is not None]


def _choices(kinds: Sequence[Kind], count: int) -> Iterator[tuple[Kind, ...]]:
    """So many machines: of each kind alone, and those with the most GPU memory."""
    for kind in kinds:
        if kind.count >= count:
            yield (replace(kind, count=count),)
    left, mixed = count, []
    for kind in sorted(kinds, key=lambda one: -_memory(one.machine)):
        taken = min(left, kind.count)
        if taken:
            mixed.append(replace(kind, count=taken))
        left -= taken
    if not left and len(mixed) > 1:
        yield tuple(mixed)


def _memory(machine: Machine) -> int:
    return sum(accelerator.total_bytes for accelerator in machine.accelerators)


def _best(model: _Model, chosen: tuple[Kind, ...], offloads: bool) -> Serving | None:
    ways = [_arranged(model, chosen, size, offloads) for size in _sizes(model, chosen)]
    return min((way for way in ways if way is not None), key=_rank, default=None)


def _rank(way: Serving) -> tuple[float, int]:
    return (float("inf") if way.token_s is None else way.token_s, way.pipeline_parallel)


def _sizes(model: _Model, chosen: Sequence[Kind]) -> list[int]:
    """How many GPUs may share a layer."""
    common = 0
    for kind in chosen:
        common = gcd(common, len(kind.machine.accelerators))
    sizes = [size for size in range(1, common + 1) if common % size == 0]
    if model.heads is None:
        return [size for size in sizes if size & (size - 1) == 0]
    return [size for size in sizes if model.heads % size == 0]


def _arranged(model: _Model, chosen: Sequence[Kind], size: int, offloads: bool) -> Serving | None:
    places = [
        (kind, machine, tuple(range(first, first + size)))
        for machine, kind in enumerate(kind for kind in chosen for _ in range(kind.count))
        for first in range(0, len(kind.machine.accelerators), size)
    ]
    if len(places) > min(_MOST_STAGES, len(model.layers)):
        return None
    rooms = [_room(model, kind.machine, gpus, place, len(places)) for place, (kind, _, gpus) in enumerate(places)]
    spares = [_spare_ram(kind.machine, len(kind.machine.accelerators)) if offloads else 0 for kind, _, _ in places]
    if any(room < 0 for room in rooms):
        return None
    layers = _layer_bytes(model)
    sizes = [-(-nbytes // size) for nbytes in layers]
    counts = _shared_out(sizes, [room + spare for room, spare in zip(rooms, spares, strict=True)])
    if counts is None:
        return None
    stages, first = [], 0
    for place, (kind, machine, gpus) in enumerate(places):
        own = slice(first, first + counts[place])
        needed = -(-sum(layers[own]) // size)
        over = max(0, needed - rooms[place])
        if over > spares[place]:
            return None
        taken = _taken(model, place, len(places), size) + needed - over
        stages.append(Stage(kind.name, machine, gpus, counts[place], taken, over))
        first += counts[place]
    # The engine is given one size for all GPUs.
    uniform = max(-(-stage.offloaded_bytes // _GIB) for stage in stages) * _GIB
    stages = [_with_offload(model, stage, uniform, sum(other.layers for other in stages[:place])) for place, stage in enumerate(stages)]
    smallest = min(kind.machine.accelerators[gpu].total_bytes for kind, _, gpus in places for gpu in gpus)
    machines = tuple((kind.name, kind.count) for kind in chosen)
    rates = [kind.machine.rates_of(gpus[0]) for kind, _, gpus in places]
    return Serving(machines, tuple(stages), smallest, _token_s(model, stages, rates))


def _with_offload(model: _Model, stage: Stage, nbytes: int, first: int) -> Stage:
    """The stage with so many bytes of each GPU's weights in RAM, or all of them."""
    weights = -(-sum(model.layers[first : first + stage.layers]) // len(stage.gpus))
    moved = min(nbytes, weights)
    return replace(stage, offloaded_bytes=moved, gpu_bytes=stage.gpu_bytes + stage.offloaded_bytes - moved)


def _layer_bytes(model: _Model) -> list[int]:
    """What each layer takes with its keys and values."""
    cache = -(-model.cache_bytes // len(model.layers))
    return [nbytes + cache for nbytes in model.layers]


def _taken(model: _Model, place: int, stages: int, size: int) -> int:
    """Bytes of each GPU of a stage beside its layers."""
    is_end = place in (0, stages - 1)
    return model.activation_bytes + (-(-model.ends_bytes // size) if is_end else 0)


def _room(model: _Model, machine: Machine, gpus: Sequence[int], place: int, stages: int) -> int:
    """Bytes for layers on each GPU of a stage; below 0 where not even the rest fits."""
    smallest = min(machine.accelerators[gpu].total_bytes for gpu in gpus)
    return int(smallest * UTILIZATION) - _taken(model, place, stages, len(gpus))


def _spare_ram(machine: Machine, gpus: int) -> int:
    """RAM for weights of each GPU: they are pinned."""
    return machine.host.pinnable_bytes // gpus


def _shared_out(sizes: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """How many of the layers each stage holds, in order and at least one, so that the fullest stage is as little full as can be.

    Args:
        sizes: of the layers, in bytes of one GPU.
        rooms: of the stages, in the same.

    Returns:
        None where they do not fit.
    """
    before = [0, *accumulate(sizes)]
    # By number of layers: how full the fullest stage is with the stages so far, and where the last of them begins.
    fullest = [0.0] + [inf] * len(sizes)
    begins: list[list[int]] = []
    for place, room in enumerate(rooms):
        after = len(rooms) - place - 1
        found, begin = [inf] * (len(sizes) + 1), [0] * (len(sizes) + 1)
        for end in range(place + 1, len(sizes) - after + 1):
            for first in range(end - 1, place - 1, -1):
                held = before[end] - before[first]
                if held > room:
                    break
                share = max(fullest[first], held / room)
                if share < found[end]:
                    found[end], begin[end] = share, first
        fullest = found
        begins.append(begin)
    if fullest[-1] == inf:
        return None
    counts, end = [], len(sizes)
    for begin in reversed(begins):
        counts.append(end - begin[end])
        end = begin[end]
    return counts[::-1]


def _token_s(model: _Model, stages: Sequence[Stage], rates: Sequence[Rates]) -> float | None:
    if model.token is None:
        return None
    total_s, first = 0.0, 0
    for stage, own in zip(stages, rates, strict=True):
        costs, size = Costs(own), len(stage.gpus)
        works = [block.works for block in model.token.blocks[first : first + stage.layers]]
        if stage is stages[-1]:
            works.append(model.token.outside)
        for work in works:
            spent = costs.seconds(work)
            if spent is None:
                return None
            total_s += spent.total_s / size
        if stage.offloaded_bytes:
            if own.h2d_bytes_per_s <= 0:
                return None
            total_s += stage.offloaded_bytes / own.h2d_bytes_per_s
        total_s += 2 * stage.layers * _EXCHANGE_S if size > 1 else 0.0
        first += stage.layers
    return total_s + (len(stages) - 1) * _HANDOVER_S
