"""What a plugin hands over that converts weights into a format. Imports nothing at run time but the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from overflowml_core.formats import Format


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
