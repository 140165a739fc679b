"""Finds the routed experts of a block, and says which bytes belong to each of them. Reads shapes and dtypes only.

Note [what can be kept apart]. Who computes with an expert must ask for it by its number. Modules behind transformers' experts interface
are called with the numbers; experts in a list are modules of their own that are called one by one. A module that reads its stacks in a
forward of its own cannot be told to do without some of them: its experts move with their block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from overflowml_core.codec import Codec
from overflowml_core.layout import align
from overflowml_core.runtime.parts import is_plain
from overflowml_core.runtime.structure import DTYPE_NAMES, Unit, Weight

_FLAGS = ("has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` sets on every module behind its interface (5.23, integrations/moe.py)."""


@dataclass(frozen=True, slots=True)
class Bank:
    """The routed experts of one block.

    Attributes:
        name: dotted path in the component of the module that holds them.
        module: that module: one with stacked weights, or the list of experts.
        count: experts.
        attributes: what each tensor of a record is called, in the order in which they lie in it.
        weights: for stacks, one a tensor, with the experts along its first dimension; for lists, all tensors of the first expert, then of
            the second, and so on.
        is_stacked: which of the two.
        codec: converts the matrices of each expert; None where they stay as they are stored.
    """

    name: str
    module: nn.Module
    count: int
    attributes: tuple[str, ...]
    weights: tuple[Weight, ...]
    is_stacked: bool
    codec: Codec | None = None

    def weights_of(self, expert: int) -> tuple[Weight, ...]:
        """The weights that hold the tensors of one expert, in the order of ``attributes``."""
        if self.is_stacked:
            return self.weights
        size = len(self.attributes)
        return self.weights[expert * size : (expert + 1) * size]

    @property
    def tensor_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor of a record."""
        nbytes = (weight.nbytes for weight in self.weights_of(0))
        return tuple(each // self.count if self.is_stacked else each for each in nbytes)

    @property
    def matrices(self) -> tuple[tuple[int, int] | None, ...]:
        """Of each tensor of a record outputs and inputs, in the way of a linear layer's weight; None where formats do not convert it."""
        return tuple(self._matrix(weight) for weight in self.weights_of(0))

    def _matrix(self, weight: Weight) -> tuple[int, int] | None:
        shape = weight.parameter.shape
        if not self.is_stacked:
            return (shape[0], shape[1]) if weight.convertible else None
        if len(shape) != 3 or not weight.parameter.is_floating_point():
            return None
        return (shape[2], shape[1]) if getattr(self.module, "is_transposed", False) else (shape[1], shape[2])

    @property
    def converted(self) -> tuple[tuple[int, int] | None, ...]:
        """As ``matrices``, of those alone that the codec converts."""
        if self.codec is None:
            return (None,) * len(self.attributes)
        names = (DTYPE_NAMES.get(weight.parameter.dtype, "") for weight in self.weights_of(0))
        pairs = zip(self.matrices, names, strict=True)
        return tuple(shape if shape is not None and self.codec.format.converts(*shape, name) else None for shape, name in pairs)

    @property
    def converted_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the matrices that the codec converts are converted from, each one once."""
        pairs = zip(self.weights_of(0), self.converted, strict=True)
        return tuple(dict.fromkeys(weight.parameter.dtype for weight, shape in pairs if shape is not None))

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert as it waits and is cached, alignment included."""
        pairs = zip(self.tensor_bytes, self.converted, strict=True)
        return sum(
            align(nbytes) if shape is None or self.codec is None else self.codec.format.slab_bytes(*shape) for nbytes, shape in pairs
        )


def banks_of(unit: Unit, count: int = 0) -> tuple[Bank, ...]:
    """The banks of a block whose experts can be kept apart from it.

    Args:
        unit: the block.
        count: experts in a bank by the model's configuration; 0 where it names none. Lists are taken for experts only if they are as long.
    """
    if unit.module is None:
        return ()
    owned = {(id(w.owners[0].module), w.owners[0].attribute): w for w in unit.weights if len(w.owners) == 1 and is_plain(w.parameter)}
    prefix = f"{unit.name}." if unit.name else ""
    banks: list[Bank] = []
    for path, module in unit.module.named_modules():
        name = f"{prefix}{path}" if path else unit.name
        bank = _stacked(name, module, owned) if _follows_interface(module) else _listed(name, module, owned, count)
        if bank is not None:
            banks.append(bank)
    return tuple(banks)


def experts_in(module: nn.Module) -> list[nn.Module]:
    """The experts in a list, which may hold a dropout beside them."""
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def without(unit: Unit, banks: Sequence[Bank]) -> Unit:
    """A block without the weights of its banks."""
    apart = {id(weight.parameter) for bank in banks for weight in bank.weights}
    return Unit(unit.name, unit.module, tuple(weight for weight in unit.weights if id(weight.parameter) not in apart))


def _follows_interface(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS) and callable(getattr(module, "_apply_gate", None))


def _stacked(name: str, module: nn.Module, owned: dict[tuple[int, str], Weight]) -> Bank | None:
    attributes = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    if module.has_bias:
        attributes += [f"{attribute}_bias" for attribute in attributes]
    weights = [owned.get((id(module), attribute)) for attribute in attributes]
    found = [weight for weight in weights if weight is not None]
    # With parameters beside them, such as scales, they are not all that an expert computes with.
    if len(found) < len(attributes) or sum(parameter is not None for parameter in module._parameters.values()) > len(attributes):
        return None
    count = int(found[0].parameter.shape[0])
    shapes_fit = all(w.parameter.dim() >= 2 and w.parameter.shape[0] == count for w in found)
    if not shapes_fit or count != getattr(module, "num_experts", count):
        return None
    return Bank(name, module, count, tuple(attributes), tuple(found), is_stacked=True)


def _listed(name: str, module: nn.Module, owned: dict[tuple[int, str], Weight], count: int) -> Bank | None:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or count < 2 or len(experts_in(module)) != count:
        return None
    weights: list[Weight] = []
    shapes: set[tuple[object, ...]] = set()
    attributes: tuple[str, ...] = ()
    for expert in experts_in(module):
        places = [
            (f"{path}.{attribute}" if path else attribute, owned.get((id(inner), attribute)))
            for path, inner in expert.named_modules()
            for attribute, parameter in inner._parameters.items()
            if parameter is not None
        ]
        found = [weight for _, weight in places if weight is not None]
        if not found or len(found) < len(places):
            return None
        attributes = tuple(attribute for attribute, _ in places)
        shapes.add((attributes, *((tuple(w.parameter.shape), w.parameter.dtype) for w in found)))
        weights += found
    return Bank(name, module, count, attributes, tuple(weights), is_stacked=False) if len(shapes) == 1 else None
