"""Which weights formats may convert: those of linear layers that are called, and that nobody wants kept as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from overflowml_core.facts import Linear
from overflowml_core.runtime.parts import is_plain

if TYPE_CHECKING:
    from overflowml_core.runtime.structure import Owner

_DECLARED = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Attributes by which models of both hosts say which of their parts lose too much in fewer bits."""

_ADAPTERS = frozenset({"lora_A", "lora_B"})
"""Parts of a name by which PEFT calls the small matrices beside a layer: what they add is small, and they change place with adapters."""


def kept_names(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names, taken apart at their dots, of the parts that a model declares as to be kept in float32."""
    found: set[tuple[str, ...]] = set()
    for inner in module.modules():
        for attribute in _DECLARED:
            names = getattr(inner, attribute, None)
            if isinstance(names, (list, tuple, set, frozenset)):
                found.update(tuple(name.split(".")) for name in names if isinstance(name, str) and name)
    return tuple(sorted(found))


def is_convertible(names: Sequence[str], owners: Iterable[Owner], parameter: nn.Parameter, kept: Sequence[tuple[str, ...]]) -> bool:
    """Whether a format may convert a parameter.

    Args:
        names: dotted paths of all places that hold it.
        owners: these places.
        parameter: with or without data; what is quantized already, or no matrix of floating-point numbers, is left as it is.
        kept: from :func:`kept_names`.
    """
    if not is_plain(parameter) or not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2 or parameter.dim() != 2:
        return False
    if not all(owner.attribute == "weight" and _computes_as_linear(owner.module) for owner in owners):
        return False
    for name in names:
        path = tuple(name.split("."))
        if _ADAPTERS & set(path) or any(_contains(path, part) for part in kept):
            return False
    return True


def _computes_as_linear(module: nn.Module) -> bool:
    """Whether a layer is torch's linear one, called as such. A subclass with a forward of its own may do anything with its weight; that of
    torch's attention is read and never called."""
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return is_linear and type(module).forward is nn.Linear.forward


def _contains(path: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(path[start : start + len(part)] == part for start in range(len(path) - len(part) + 1))


def linears_of(parameters: Iterable[torch.Tensor], dtype_names: dict[torch.dtype, str]) -> tuple[Linear, ...]:
    """Convertible parameters by shape and dtype, sorted.

    Args:
        parameters: with or without data.
        dtype_names: names of dtypes as safetensors has them.
    """
    counts = Counter((p.shape[0], p.shape[1], dtype_names.get(p.dtype, str(p.dtype))) for p in parameters)
    return tuple(Linear(rows, columns, dtype, count) for (rows, columns, dtype), count in sorted(counts.items()))
