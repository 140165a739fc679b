"""A slab: one flat buffer that holds all weights of a unit, and the views that read them out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from overflowml_core.layout import slab_offsets
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.parts import Part, Path, parameter_over
from overflowml_core.runtime.structure import Unit, Weight


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight in a slab, or one part of a quantized one: where it lies, how to see it, and where its bytes come from.

    ``path`` leads to the part in the weight, and is empty for a plain one. ``origin`` is where the data lies in a file as a whole;
    ``scattered`` are its pieces where it lies in several, of one dtype, one behind the other. Without either the data is the parameter's.
    """

    weight: Weight
    offset_bytes: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin | None
    path: Path = ()
    scattered: tuple[Origin, ...] = ()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where the data lies in files, piece by piece; empty where it is the parameter itself."""
        return self.scattered if self.origin is None else (self.origin,)

    def view(self, buffer: torch.Tensor, base_bytes: int = 0) -> torch.Tensor:
        """The weight, or the part of it, as a plain tensor over a byte buffer that holds the slab from its byte ``base_bytes`` on."""
        start = self.offset_bytes - base_bytes
        flat = buffer[start : start + self.nbytes].view(self.dtype)
        return torch.as_strided(flat, self.shape, self.stride, flat.storage_offset())

    def present(self) -> torch.Tensor:
        """The weight, or the part of it, as the parameter holds it now."""
        return next(part.tensor.detach() for part in self.weight.parts if part.path == self.path)


@dataclass(frozen=True, slots=True)
class Slab:
    """The layout of a unit's weights in one buffer: ``entries`` in the unit's order, the parts of a weight side by side; ``nbytes`` is the
    size of the buffer."""

    unit: Unit
    entries: tuple[Entry, ...]
    nbytes: int

    def by_weight(self) -> list[tuple[Weight, list[Entry]]]:
        """Each weight with its entries, in the unit's order."""
        groups = [list(entries) for _, entries in groupby(self.entries, key=lambda entry: id(entry.weight))]
        return [(entries[0].weight, entries) for entries in groups]

    def tensors(self, view: Callable[[Entry], torch.Tensor]) -> list[tuple[Weight, dict[Path, torch.Tensor]]]:
        """Each weight with the plain tensors of its parts by path, as ``view`` gives them."""
        return [(weight, {entry.path: view(entry) for entry in entries}) for weight, entries in self.by_weight()]

    def parameters(self, buffer: torch.Tensor) -> tuple[nn.Parameter, ...]:
        """A parameter over the buffer for each weight, of the weight's own class.

        ``requires_grad`` is the original's, although no gradient is ever taken: torch chooses between kernels by it (a batched product
        is folded into a plain one only where the weight requires a gradient), and outputs shall be identical to the unmanaged model's.
        """
        # Outside inference mode, whatever the caller is in: inference tensors could not be used under autograd later.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(parameter_over(weight.parameter, tensors) for weight, tensors in self.tensors(lambda entry: entry.view(buffer)))

    def install(self, parameters: tuple[nn.Parameter, ...]) -> None:
        """Put these parameters, one for each weight, where the unit's weights are held."""
        # Assigned in the dictionary: __setattr__ would check and register, twenty times slower, on every pass.
        for weight, parameter in zip(self.unit.weights, parameters, strict=True):
            for owner in weight.owners:
                owner.module._parameters[owner.attribute] = parameter


def lay_out(unit: Unit, loading: Loading | None) -> Slab:
    """Plan the slab of a unit.

    Args:
        unit: the weights.
        loading: knows where weights without data are to be read; None where all have data.
    """
    parts = [(weight, part) for weight in unit.weights for part in weight.parts]
    offsets, nbytes = slab_offsets(part.nbytes for _, part in parts)
    entries = tuple(_entry(weight, part, offset, loading) for (weight, part), offset in zip(parts, offsets, strict=True))
    return Slab(unit, entries, nbytes)


def _entry(weight: Weight, part: Part, offset: int, loading: Loading | None) -> Entry:
    # One of several parts is never deferred.
    known = loading if loading is not None and not part.path else None
    origin = known.origin_of(weight.parameter) if known is not None else None
    scattered = known.pieces_of(weight.parameter) if known is not None and origin is None else ()
    tensor, shape = part.tensor, tuple(part.tensor.shape)
    in_files = origin is not None or bool(scattered)
    stride = tuple(tensor.stride()) if not in_files and _is_dense(tensor) else contiguous_stride(shape)
    return Entry(weight, offset, part.nbytes, shape, stride, tensor.dtype, origin, part.path, scattered)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their bytes without gaps, in whatever order (as channels-last weights do)."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor of this shape whose rows stand one behind the other."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
