"""A slab: one flat buffer that holds all weights of a unit, and the views that read them out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from overflowml_core.layout import slab_offsets
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.structure import Unit, Weight


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight in a slab: where it lies, how to see it, and where its bytes come from.

    ``origin`` is None for a weight whose data is the parameter itself.
    """

    weight: Weight
    offset_bytes: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin | None

    def view(self, buffer: torch.Tensor, base_bytes: int = 0) -> torch.Tensor:
        """The weight as a tensor over a byte buffer that holds the slab, or the part of it from ``base_bytes`` on."""
        start = self.offset_bytes - base_bytes
        flat = buffer[start : start + self.nbytes].view(self.dtype)
        return torch.as_strided(flat, self.shape, self.stride, flat.storage_offset())


@dataclass(frozen=True, slots=True)
class Slab:
    """The layout of a unit's weights in one buffer. ``nbytes`` is the size of the buffer."""

    unit: Unit
    entries: tuple[Entry, ...]
    nbytes: int

    def parameters(self, buffer: torch.Tensor) -> tuple[nn.Parameter, ...]:
        """A parameter over the buffer for each entry.

        ``requires_grad`` is the original's, although no gradient is ever taken: torch chooses between kernels by it (a batched product
        is folded into a plain one only where the weight requires a gradient), and outputs shall be identical to the unmanaged model's.
        """
        # Outside inference mode, whatever the caller is in: inference tensors could not be used under autograd later.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(nn.Parameter(entry.view(buffer), requires_grad=entry.weight.parameter.requires_grad) for entry in self.entries)

    def install(self, parameters: tuple[nn.Parameter, ...]) -> None:
        """Put these parameters where the unit's weights are held."""
        # Assigned in the dictionary: __setattr__ would check and register, twenty times slower, on every pass.
        for entry, parameter in zip(self.entries, parameters, strict=True):
            for owner in entry.weight.owners:
                owner.module._parameters[owner.attribute] = parameter


def lay_out(unit: Unit, loading: Loading | None) -> Slab:
    """Plan the slab of a unit.

    Args:
        unit: the weights.
        loading: knows where weights without data are to be read; None where all have data.
    """
    offsets, nbytes = slab_offsets(weight.nbytes for weight in unit.weights)
    entries = tuple(_entry(weight, offset, loading) for weight, offset in zip(unit.weights, offsets, strict=True))
    return Slab(unit, entries, nbytes)


def _entry(weight: Weight, offset: int, loading: Loading | None) -> Entry:
    parameter = weight.parameter
    origin = loading.origin_of(parameter) if loading is not None else None
    stride = parameter.stride() if origin is None and _is_dense(parameter) else _contiguous_stride(tuple(parameter.shape))
    return Entry(weight, offset, weight.nbytes, tuple(parameter.shape), tuple(stride), parameter.dtype, origin)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their bytes without gaps, in whatever order (as channels-last weights do)."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
