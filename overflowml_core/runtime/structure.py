"""What a module consists of: its blocks in order of execution, and the weights outside them. The planner's facts are made of it elsewhere.

Reads shapes and dtypes only, so that modules on the meta device serve as well as loaded ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.layout import slab_bytes
from overflowml_core.runtime.linears import is_convertible, kept_names
from overflowml_core.runtime.parts import Part, decoded_shape, is_known, parts_of

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
    """One parameter, with every place that holds it. ``name`` is the first one's dotted path in the component; ``convertible`` says whether
    formats may convert it."""

    name: str
    parameter: nn.Parameter
    owners: tuple[Owner, ...]
    convertible: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The plain tensors that it is made of: itself, or more where it is quantized."""
        return parts_of(self.parameter)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of all its parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def weight_count(self) -> int:
        """How many weights it stands for, packed or not."""
        return prod(decoded_shape(self.parameter))


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that move together: a block, or everything outside the blocks (``module`` is None then)."""

    name: str
    module: nn.Module | None
    weights: tuple[Weight, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of the flat buffer that holds the weights."""
        return slab_bytes(part.nbytes for w in self.weights for part in w.parts)


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
        Unsupported: a parameter is of a class that cannot be taken apart, as some quantizers make them.
    """
    blocks = find_blocks(module)
    block_of = _whereabouts(module, blocks)
    owners: dict[int, list[tuple[str, Owner, str | None]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, inner, attribute, parameter in walk_parameters(module):
        if not is_known(parameter):
            raise _cannot_take_apart(path, inner, parameter)
        parameters[id(parameter)] = parameter
        owners.setdefault(id(parameter), []).append((path, Owner(inner, attribute), block_of.get(id(inner))))
    per_block: dict[str, list[Weight]] = {name: [] for name, _ in blocks}
    fixed: list[Weight] = []
    kept = kept_names(module)
    for key, places in owners.items():
        held_by = tuple(owner for _, owner, _ in places)
        convertible = is_convertible([name for name, _, _ in places], held_by, parameters[key], kept)
        weight = Weight(places[0][0], parameters[key], held_by, convertible)
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
    for _, inner, _, parameter in walk_parameters(module):
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


def walk_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every place that holds a parameter, as (dotted path, module, attribute, parameter), in the order in which they are registered."""
    for path, inner in module.named_modules():
        for attribute, parameter in inner._parameters.items():
            if parameter is not None:
                yield (f"{path}.{attribute}" if path else attribute), inner, attribute, parameter


def _cannot_take_apart(path: str, owner: nn.Module, parameter: nn.Parameter) -> Unsupported:
    kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
    return Unsupported(
        f"{path}: a {kind.__name__} in a {type(owner).__name__}, which overflowml cannot take apart and stream; "
        "load the model without quantization, quantize it with torchao (TorchAoConfig), or load it without overflowml"
    )
