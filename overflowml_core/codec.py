"""What a plugin hands over that converts weights into a format. Imports nothing at run time but the standard library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from overflowml_core.formats import Format


@dataclass(frozen=True, slots=True)
class Kernel:
    """A product of rows with a converted weight.

    Attributes:
        name: for people.
        multiply: called with (tokens, columns) and the parts of a weight by their paths; gives (tokens, rows).
    """

    name: str
    multiply: Callable[[torch.Tensor, Mapping[tuple[str, ...], torch.Tensor]], torch.Tensor]


@runtime_checkable
class Codec(Protocol):
    """Converts weights of linear layers into a format, one at a time.

    ``format`` is what the planner was told; the parts of every converted weight take exactly the bytes that it says. ``version`` changes
    whenever the same weight would become other bytes.
    """

    format: Format
    version: str

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the format.

        Args:
            weight: rows by columns, on any device; left as it is.
        """
        ...

    def template(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """What :meth:`encode` makes of a weight of this shape and dtype, without data."""
        ...


@runtime_checkable
class MatrixCodec(Codec, Protocol):
    """A codec that also computes with what it made, outside of any layer: with the matrices of routed experts."""

    def decode(self, parts: Mapping[tuple[str, ...], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight that the parts stand for, rows by columns, as the layer of the format decodes it: to the bit.

        Args:
            parts: the tensors of a converted weight by their paths, on any device.
            dtype: of the weight as it was.
        """
        ...

    def kernel(self, device_type: str, dtype: torch.dtype) -> Kernel | None:
        """A product with a converted weight that does not decode it first.

        Args:
            device_type: as torch names it.
            dtype: of the weight as it was, and of what it is multiplied with.

        Returns:
            None where this build of torch has none for the device that gives the right results.
        """
        ...
