"""Experts whose matrices are in a format: how they lie in a record, how one is converted, and what is computed with it.

Note [which way]. The codec knows whether a device has a kernel that multiplies without decoding. Where it has none, one matrix at a time is
decoded into memory of its own, and the product is the one that plain experts take. Codecs that know of neither multiply as a layer of
their format does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional

from overflowml_core.codec import Codec, Kernel, MatrixCodec
from overflowml_core.errors import PlanMismatch
from overflowml_core.layout import slab_offsets
from overflowml_core.runtime.encode import EncodedWeight, sources_of
from overflowml_core.runtime.experts.bank import Bank
from overflowml_core.runtime.parts import Part, Path, parameter_over, parts_of, rebuilt
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.source import fill, values_of


def kernel_of(codec: Codec | None, device_type: str, dtype: torch.dtype) -> Kernel | None:
    """What multiplies with converted matrices on a device without decoding them; None where nothing does."""
    return codec.kernel(device_type, dtype) if isinstance(codec, MatrixCodec) else None


class Way:
    """How the matrices of a bank that look alike are computed with."""

    def __init__(self, codec: Codec, like: nn.Parameter, dtype: torch.dtype) -> None:
        """Know nothing of devices yet.

        Args:
            codec: that converts them.
            like: what becomes of one, without data.
            dtype: of the matrices as they were.
        """
        self.dtype = dtype
        self._like = like
        self._codec = codec if isinstance(codec, MatrixCodec) else None
        self._kernels: dict[str, Kernel | None] = {}

    def kernel(self, device_type: str) -> Kernel | None:
        """What multiplies on a device without decoding; None where nothing does."""
        if device_type not in self._kernels:
            self._kernels[device_type] = kernel_of(self._codec, device_type, self.dtype)
        return self._kernels[device_type]

    def decoded(self, parts: Mapping[Path, torch.Tensor]) -> torch.Tensor:
        """A matrix as a layer may hold it: decoded where the codec can do that, else in its format."""
        if self._codec is not None:
            return self._codec.decode(parts, self.dtype)
        return parameter_over(self._like, parts)

    def product(self, x: torch.Tensor, parts: Mapping[Path, torch.Tensor]) -> torch.Tensor:
        """Rows (tokens, inputs) times a matrix of outputs by inputs."""
        x = x.to(self.dtype)
        kernel = self.kernel(x.device.type)
        if kernel is not None:
            return kernel.multiply(x, parts)
        if self._codec is not None:
            return torch.mm(x, self._codec.decode(parts, self.dtype).t())
        return functional.linear(x, rebuilt(self._like, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMatrix(EncodedWeight):
    """A matrix of one expert in a format.

    Attributes:
        is_transposed: it is kept as inputs by outputs; formats take outputs by inputs, with a scale for each output.
        way: how it is computed with.
    """

    is_transposed: bool
    way: Way

    @property
    def recipe(self) -> str:
        """As of any converted weight, with what is done before."""
        return f"{self.codec.format.name}:{self.codec.version}{' transposed' if self.is_transposed else ''}"

    def encode(self, values: torch.Tensor) -> dict[Path, torch.Tensor]:
        """The parts of the converted matrix.

        Args:
            values: of the matrix as the model keeps it.
        """
        return EncodedWeight.encode(self, values.t().contiguous() if self.is_transposed else values)


class Matrix:
    """A matrix in a format, over the bytes of a record."""

    __slots__ = ("_parts", "_way")

    def __init__(self, way: Way, parts: Mapping[Path, torch.Tensor]) -> None:
        self._way = way
        self._parts = parts

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (tokens, inputs) times the matrix: (tokens, outputs)."""
        return self._way.product(x, self._parts)

    def decoded(self) -> torch.Tensor:
        """What a layer may hold for it."""
        return self._way.decoded(self._parts)


Operand: TypeAlias = torch.Tensor | Matrix
"""A tensor of an expert as it is computed with."""


def operands_of(slab: Slab, buffer: torch.Tensor) -> tuple[Operand, ...]:
    """The tensors of one expert over the bytes of its record, in the order of its bank's attributes."""
    found: list[Operand] = []
    parts: dict[Path, torch.Tensor] = {}
    weight: object = None
    for entry in slab.entries:
        if not isinstance(entry.weight, EncodedMatrix):
            found.append(entry.view(buffer))
            continue
        if entry.weight is not weight:
            weight, parts = entry.weight, {}
            found.append(Matrix(entry.weight.way, parts))
        parts[entry.path] = entry.view(buffer)
    return tuple(found)


def encoded_records(bank: Bank, plain: Sequence[Slab]) -> list[Slab]:
    """The records of a bank with its matrices in its format.

    Args:
        bank: with a codec.
        plain: the records as the model has them.

    Raises:
        PlanMismatch: the codec makes other parts than the planner was told.
    """
    likes: dict[int, tuple[nn.Parameter, Way]] = {}
    for place, shape in enumerate(bank.converted):
        if shape is not None and bank.codec is not None:
            dtype = plain[0].entries[place].dtype
            with torch.no_grad():
                like = nn.Parameter(bank.codec.template(*shape, dtype), requires_grad=False)
            likes[place] = (like, Way(bank.codec, like, dtype))
    parts = [parts_of(likes[place][0]) if place in likes else () for place in range(len(bank.attributes))]
    sizes = [[p.nbytes for p in own] or [plain[0].entries[place].nbytes] for place, own in enumerate(parts)]
    offsets, nbytes = slab_offsets(size for own in sizes for size in own)
    if nbytes != bank.record_bytes:
        raise PlanMismatch(
            f"{bank.name}: an expert in its format takes {nbytes} bytes, and the plan counts {bank.record_bytes}; plan on this machine"
        )
    made: list[Slab] = []
    for slab in plain:
        entries: list[Entry] = []
        for place, entry in enumerate(slab.entries):
            if place not in likes:
                entries.append(replace(entry, offset_bytes=offsets[len(entries)]))
                continue
            weight = _matrix(bank, entry, *likes[place])
            entries += [_part(weight, part, offsets[len(entries) + number]) for number, part in enumerate(parts[place])]
        made.append(Slab(slab.unit, tuple(entries), nbytes))
    return made


def _matrix(bank: Bank, entry: Entry, like: nn.Parameter, way: Way) -> EncodedMatrix:
    assert bank.codec is not None  # without one nothing is converted
    turned = bank.is_stacked and bool(getattr(bank.module, "is_transposed", False))
    whole = entry.weight
    device = whole.parameter.device
    return EncodedMatrix(whole.name, like, whole.owners, plain=entry, device=device, codec=bank.codec, is_transposed=turned, way=way)


def _part(weight: EncodedMatrix, part: Part, offset: int) -> Entry:
    tensor = part.tensor
    return Entry(weight, offset, part.nbytes, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, None, part.path)


def fill_encoded(bank: Bank, slabs: Sequence[Slab], buffer: torch.Tensor, reader: FileReader) -> None:
    """Convert all experts of a bank, one matrix at a time, into a buffer that holds one record behind the other.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        PlanMismatch: a weight has neither data nor an origin.
    """
    size = bank.record_bytes
    for expert, slab in enumerate(slabs):
        record = buffer[expert * size : (expert + 1) * size]
        fill([entry for entry in slab.entries if sources_of(entry)], record, reader)
        with torch.no_grad():
            for weight, entries in slab.by_weight():
                if not sources_of(entries[0]):
                    _convert_live(bank, expert, weight if isinstance(weight, EncodedMatrix) else None, entries, record, reader)
    for weight in (entry.weight for slab in slabs for entry in slab.entries):
        if isinstance(weight, EncodedMatrix):
            weight.put_aside()


def _convert_live(
    bank: Bank, expert: int, weight: EncodedMatrix | None, entries: Sequence[Entry], record: torch.Tensor, reader: FileReader
) -> None:
    plain = entries[0] if weight is None else weight.plain
    whole = values_of(plain, reader)
    values = (whole[expert] if bank.is_stacked else whole).to("cpu")
    made: Mapping[Path, torch.Tensor] = {(): values} if weight is None else weight.encode(values)
    for entry in entries:
        entry.view(record).copy_(made[entry.path])
