"""What a module consists of: its blocks in order of execution, the weights outside them, and both as facts for the planner.

Reads shapes and dtypes only, so that modules on the meta device serve as well as loaded ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.facts import Block, Component, Experts, TensorFact, tensors_fingerprint
from overflowml_core.layout import align, slab_bytes

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
"""torch's dtypes by the names that safetensors gives them (format specification, "dtype")."""

TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Owner:
    """A place in the module tree that holds a parameter: ``module._parameters[attribute]``."""

    module: nn.Module
    attribute: str


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter, with every place that holds it. ``name`` is the first one's dotted path in the component."""

    name: str
    parameter: nn.Parameter
    owners: tuple[Owner, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return int(self.parameter.numel() * self.parameter.element_size())


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that move together: a block, or everything outside the blocks (``module`` is None then)."""

    name: str
    module: nn.Module | None
    weights: tuple[Weight, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of the flat buffer that holds the weights."""
        return slab_bytes(w.nbytes for w in self.weights)


@dataclass(frozen=True, slots=True)
class Structure:
    """A module taken apart: blocks in order, the weights outside them, and the buffers, which always stay on the device."""

    blocks: tuple[Unit, ...]
    fixed: Unit
    buffers: tuple[tuple[str, nn.Module, str], ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, the fixed one first."""
        return (self.fixed, *self.blocks)


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a module as (dotted path, module), in the order in which they are registered.

    Classes that the model itself declares (diffusers' ``_repeated_blocks``, both hosts' ``_no_split_modules``) count where at least two
    instances exist; then the entries of the outermost module lists of two or more, unless they contain declared blocks.
    Declarations alone miss a quarter of the model files of transformers and most UNets; lists alone miss nearly nothing,
    but cut UNets coarsely. Entries without children (a list of plain linear layers) are left out: models read their
    weights without calling them.
    """
    declared = _declared_classes(module)
    instances: dict[str, int] = {}
    for _, child in module.named_modules():
        if type(child).__name__ in declared:
            instances[type(child).__name__] = instances.get(type(child).__name__, 0) + 1
    repeated = {name for name, count in instances.items() if count >= 2}
    found: list[tuple[str, nn.Module]] = []
    _collect(module, "", repeated, found, set())
    return [(name, block) for name, block in found if any(True for _ in block.parameters())]


def _declared_classes(module: nn.Module) -> set[str]:
    declared: set[str] = set()
    for child in module.modules():
        for attribute in ("_repeated_blocks", "_no_split_modules"):
            names = getattr(child, attribute, None)
            if isinstance(names, (list, tuple, set, frozenset)):
                declared.update(name for name in names if isinstance(name, str))
    return declared


def _collect(module: nn.Module, path: str, repeated: set[str], found: list[tuple[str, nn.Module]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    in_list = isinstance(module, nn.ModuleList) and len(module) >= 2
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if id(child) in seen:
            continue
        has_children = next(child.children(), None) is not None
        is_declared = type(child).__name__ in repeated and has_children
        holds_declared = any(type(inner).__name__ in repeated for inner in child.modules() if inner is not child)
        callable_block = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if is_declared or (in_list and has_children and callable_block and not holds_declared):
            seen.update(id(inner) for inner in child.modules())
            found.append((where, child))
        else:
            _collect(child, where, repeated, found, seen)


def dissect(module: nn.Module) -> Structure:
    """Take a module apart.

    A parameter that several blocks hold, or a block and something outside, belongs to the fixed unit, so that it is there for both;
    so do the parameters of a module that lies in several of these places.

    Raises:
        Unsupported: a parameter is a tensor subclass, as quantizers make them.
    """
    blocks = find_blocks(module)
    block_of = _whereabouts(module, blocks)
    owners: dict[int, list[tuple[str, Owner, str | None]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, inner, attribute, parameter in _walk(module):
        _refuse_subclass(path, parameter)
        parameters[id(parameter)] = parameter
        owners.setdefault(id(parameter), []).append((path, Owner(inner, attribute), block_of.get(id(inner))))
    per_block: dict[str, list[Weight]] = {name: [] for name, _ in blocks}
    fixed: list[Weight] = []
    for key, places in owners.items():
        weight = Weight(places[0][0], parameters[key], tuple(owner for _, owner, _ in places))
        homes = {home for _, _, home in places}
        home = homes.pop()
        if homes or home is None:
            fixed.append(weight)
        else:
            per_block[home].append(weight)
    units = tuple(Unit(name, block, tuple(per_block[name])) for name, block in blocks if per_block[name])
    buffers = tuple(
        (f"{path}.{attribute}" if path else attribute, inner, attribute)
        for path, inner in module.named_modules()
        for attribute, buffer in inner._buffers.items()
        if buffer is not None
    )
    return Structure(units, Unit("", None, tuple(fixed)), buffers)


def own_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that :func:`dissect` finds, as (dotted path, module), in its order: those with weights that nobody shares with them.

    Looks at no data and accepts every kind of parameter.
    """
    blocks = find_blocks(module)
    block_of = _whereabouts(module, blocks)
    homes: dict[int, set[str | None]] = {}
    for _, inner, _, parameter in _walk(module):
        homes.setdefault(id(parameter), set()).add(block_of.get(id(inner)))
    owners = {next(iter(places)) for places in homes.values() if len(places) == 1}
    return [(name, block) for name, block in blocks if name in owners]


def _whereabouts(module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> dict[int, str | None]:
    """By id of a module the only block that it lies in; None where it lies outside, or in several places."""
    found: dict[int, str | None] = {}

    def note(inner: nn.Module, place: str | None) -> None:
        found[id(inner)] = place if found.get(id(inner), place) == place else None

    for name, block in blocks:
        for inner in block.modules():
            note(inner, name)
    seen = {id(block) for _, block in blocks}
    pending = [module]
    while pending:
        inner = pending.pop()
        if id(inner) not in seen:
            seen.add(id(inner))
            note(inner, None)
            pending.extend(inner.children())
    return found


def _walk(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for path, inner in module.named_modules():
        for attribute, parameter in inner._parameters.items():
            if parameter is not None:
                yield (f"{path}.{attribute}" if path else attribute), inner, attribute, parameter


def _refuse_subclass(path: str, parameter: nn.Parameter) -> None:
    # A Parameter is itself a subclass; quantizers' tensors are recognized by their own class or their data's.
    if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
        kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
        raise Unsupported(
            f"{path}: a {kind.__name__}, which this version cannot move; load the model without quantization, or without overflowml"
        )


def weight_facts(module: nn.Module) -> tuple[TensorFact, ...]:
    """Every parameter once, by the first name that holds it."""
    seen: set[int] = set()
    facts: list[TensorFact] = []
    for path, _, _, parameter in _walk(module):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            dtype = DTYPE_NAMES.get(parameter.dtype, str(parameter.dtype))
            facts.append(TensorFact(path, tuple(parameter.shape), dtype, parameter.numel() * parameter.element_size()))
    return tuple(facts)


def describe_module(
    module: nn.Module,
    name: str,
    phase: str | None = None,
    activation_bytes: int = 0,
    activation_source: str = "none",
) -> Component:
    """A module as the planner sees it.

    Args:
        module: loaded or on the meta device.
        name: what the component is called.
        phase: which components it shares the budget with at the same time; its own name by default.
        activation_bytes: peak of activations and caches while it runs.
        activation_source: where that number comes from.

    Raises:
        Unsupported: a parameter is a tensor subclass.
    """
    structure = dissect(module)
    routing = _routing(module)
    blocks = tuple(
        Block(
            name=unit.name,
            weight_count=sum(w.parameter.numel() for w in unit.weights),
            stored_bytes=sum(w.nbytes for w in unit.weights),
            slab_bytes=unit.slab_bytes,
            bytes_by_dtype=_by_dtype(unit.weights),
            linear_count=sum(w.parameter.numel() for w in unit.weights if _is_linear(w)),
            experts=_experts(unit, routing),
        )
        for unit in structure.blocks
    )
    everything = [weight for unit in structure.units for weight in unit.weights]
    return Component(
        name=name,
        class_name=type(module).__name__,
        blocks=blocks,
        resident_bytes=structure.fixed.slab_bytes + buffer_bytes(structure),
        resident_weight_count=sum(w.parameter.numel() for w in structure.fixed.weights),
        bytes_by_dtype=_by_dtype(everything),
        phase=phase or name,
        activation_bytes=activation_bytes,
        activation_source=activation_source,
        fingerprint=tensors_fingerprint(type(module).__name__, weight_facts(module)),
    )


def _is_linear(weight: Weight) -> bool:
    return all(isinstance(owner.module, nn.Linear) and owner.attribute == "weight" for owner in weight.owners)


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
"""What configs call the size of a bank and how many of it a token uses (transformers 5.23, models/*/configuration_*.py)."""


def _routing(module: nn.Module) -> tuple[int, int] | None:
    """Experts in a bank and experts for a token, by the module's configuration; None where it names none."""
    config = getattr(module, "config", None)
    inner = getattr(config, "get_text_config", None)
    config = inner() if callable(inner) else config
    count, per_token = _first_count(config, _EXPERT_COUNTS), _first_count(config, _EXPERTS_PER_TOKEN)
    return (count, per_token) if count > 1 and 0 < per_token <= count else None


def _first_count(config: object, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)


def _experts(unit: Unit, routing: tuple[int, int] | None) -> Experts | None:
    """The routed experts of a block: stacked along the first dimension of 3-D weights, or modules in a list of their number."""
    if routing is None or unit.module is None:
        return None
    count, per_token = routing
    stacked = {id(w.owners[0].module) for w in unit.weights if w.parameter.dim() == 3 and w.parameter.shape[0] == count}
    # Biases of stacked experts lie beside them, and have the same first dimension.
    nbytes = sum(w.nbytes for w in unit.weights if id(w.owners[0].module) in stacked and w.parameter.shape[:1] == (count,))
    listed = {
        id(parameter)
        for inner in unit.module.modules()
        if isinstance(inner, (nn.ModuleList, nn.ModuleDict)) and len(inner) == count and not stacked
        for parameter in inner.parameters()
    }
    nbytes += sum(w.nbytes for w in unit.weights if id(w.parameter) in listed)
    return Experts(count, nbytes // count, per_token) if nbytes else None


def buffer_bytes(structure: Structure) -> int:
    """Device bytes of the buffers, each one aligned as an allocation of its own."""
    total = 0
    for _, module, attribute in structure.buffers:
        buffer = module._buffers[attribute]
        if buffer is not None:
            total += align(buffer.numel() * buffer.element_size())
    return total


def _by_dtype(weights: list[Weight] | tuple[Weight, ...]) -> tuple[tuple[str, int], ...]:
    totals: dict[str, int] = {}
    for weight in weights:
        name = DTYPE_NAMES.get(weight.parameter.dtype, str(weight.parameter.dtype))
        totals[name] = totals.get(name, 0) + weight.nbytes
    return tuple(sorted(totals.items()))
