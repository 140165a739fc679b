"""Formats of weights beside the one in which they are stored: sizes, errors, and what they need. Values only; nothing is converted here."""

from __future__ import annotations

from dataclasses import dataclass

from overflowml_core.layout import align

AS_STORED = ""
"""Name of no format: weights stay as they are stored."""

ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Of the dtypes that weights are converted from, as safetensors spells them. Weights in any other are packed by a format of their own."""


@dataclass(frozen=True, slots=True)
class PartSize:
    """One of the tensors that a converted weight consists of.

    Attributes:
        bits: of an element.
        columns: columns of the weight that share an element; 0 where a whole row shares one.
        rows: rows of the weight that share an element; 0 where all of them do.
    """

    bits: int
    columns: int = 1
    rows: int = 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the part of a weight with so many rows and columns."""
        in_a_row = -(-columns // self.columns) if self.columns else 1
        in_a_column = -(-rows // self.rows) if self.rows else 1
        return -(-in_a_column * in_a_row * self.bits // 8)


@dataclass(frozen=True, slots=True)
class Format:
    """A format into which weights of linear layers may be converted.

    Attributes:
        name: "fp8", "int8", "int4".
        bits_per_weight: bits that a weight takes, scales and zero points included.
        loss: "minimal" or "any": what ``Limits.quality`` must permit for it to be chosen.
        relative_error: root mean square error of a normally distributed weight over its root mean square.
        decode_bytes_per_s: bytes of decoded weights that the compute tier makes a second where the weight is decoded before the product; 0
            where the kernel decodes on the way and memory bandwidth is all it costs.
        note: where the numbers come from.
        parts: the tensors that a converted weight consists of, in the order in which a slab holds them; empty where only
            ``bits_per_weight`` is known.
        dtypes: from which it converts.
        decoding_bytes: of memory for each element of a weight while it is decoded for a product; 0 where the kernel decodes on the way.
        row_multiple, column_multiple: what its kernel takes: rows and columns are multiples of these.
        kernel_dtypes: of experts' matrices that the compute tier multiplies with without decoding them, as layers of the format do.
        missing: what keeps this machine from converting weights into it, and what would help; empty where nothing does. It is planned with
            in forecasts only then.
    """

    name: str
    bits_per_weight: float
    loss: str
    relative_error: float
    decode_bytes_per_s: float = 0.0
    note: str = ""
    parts: tuple[PartSize, ...] = ()
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    decoding_bytes: int = 0
    row_multiple: int = 1
    column_multiple: int = 1
    kernel_dtypes: tuple[str, ...] = ()
    missing: str = ""

    def slab_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a slab that the parts of a converted weight take, each one aligned."""
        return sum(align(part.nbytes(rows, columns)) for part in self.parts)

    def converts(self, rows: int, columns: int, dtype: str) -> bool:
        """Whether a weight of this shape is converted: its kernel takes it, and it takes fewer bytes of a slab afterwards.

        Args:
            rows, columns: of the weight, in elements.
            dtype: as safetensors spells it.
        """
        if not self.parts or dtype not in self.dtypes or dtype not in ELEMENT_BYTES or not rows or not columns:
            return False
        if rows % self.row_multiple or columns % self.column_multiple:
            return False
        return self.slab_bytes(rows, columns) < align(rows * columns * ELEMENT_BYTES[dtype])
