"""The host's own formats of quantized weights: what the planner must know of them, and the tensors of which a file holds them.

Imports neither torch nor the host. Names and tensors are those that ComfyUI 0.33 reads (``comfy/quant_ops.py``, ``QUANT_ALGOS``, and
``comfy/ops.py``, ``_load_quantized_module``); comfy-kitchen makes them (:mod:`overflowml_comfyui.encoding`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from overflowml_core.facts import Machine
from overflowml_core.formats import Format, PartSize
from overflowml_core.inspect.safetensors import DTYPE_BITS

_ALIGNED_CHARS = 16
"""Marks are as long as a multiple of this, so that no tensor behind one is out of step with its dtype."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the tensors of a quantized weight.

    Attributes:
        suffix: of its name behind that of the weight.
        dtype: as safetensors spells it.
        size: by the shape of the weight.
    """

    suffix: str
    dtype: str
    size: PartSize

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Its shape for a weight of so many rows and columns; empty for a single number."""
        if not self.size.rows:
            return ()
        in_a_row = -(-columns // self.size.columns) if self.size.columns else 1
        return -(-rows // self.size.rows), in_a_row * self.size.bits // DTYPE_BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class HostFormat:
    """A format that the host computes with.

    Attributes:
        name: what people choose.
        algorithm: the host's name for it, and the planner's: what torchao makes of the same number of bits are other bytes.
        layout: the host's class that makes it.
        parts: the tensors, in the order in which a file holds them.
        loss, relative_error: as in :class:`overflowml_core.formats.Format`.
        options: further arguments of the layout's ``quantize``.
        row_multiple, column_multiple: of weights that it is used for.
        in_stretches: rows can be converted by themselves, once the scale of the whole weight is known.
        has_one_scale: a number for the whole weight is the scale, or the outer one.
    """

    name: str
    algorithm: str
    layout: str
    parts: tuple[StoredPart, ...]
    loss: str
    relative_error: float
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    row_multiple: int = 1
    column_multiple: int = 1
    in_stretches: bool = True
    has_one_scale: bool = False

    @property
    def mark(self) -> bytes:
        """What the tensor ``comfy_quant`` beside a weight holds: JSON, and spaces behind it that no reader minds."""
        text = json.dumps({"format": self.algorithm})
        return text.ljust(-(-len(text) // _ALIGNED_CHARS) * _ALIGNED_CHARS).encode()


FORMATS: dict[str, HostFormat] = {
    one.name: one
    for one in (
        HostFormat(
            "int8",
            "int8_tensorwise",
            "TensorWiseINT8Layout",
            (StoredPart("", "I8", PartSize(8)), StoredPart("_scale", "F32", PartSize(32, columns=0))),
            "minimal",
            0.0091,
            {"per_channel": True},
        ),
        HostFormat(
            "fp8",
            "float8_e4m3fn",
            "TensorCoreFP8E4M3Layout",
            (StoredPart("", "F8_E4M3", PartSize(8)), StoredPart("_scale", "F32", PartSize(32, columns=0, rows=0))),
            "minimal",
            0.0266,
            row_multiple=16,
            column_multiple=16,
            has_one_scale=True,
        ),
        HostFormat(
            "mxfp8",
            "mxfp8",
            "TensorCoreMXFP8Layout",
            (StoredPart("", "F8_E4M3", PartSize(8)), StoredPart("_scale", "U8", PartSize(8, columns=32))),
            "minimal",
            0.0267,
            row_multiple=128,
            column_multiple=128,
            in_stretches=False,
        ),
        HostFormat(
            "nvfp4",
            "nvfp4",
            "TensorCoreNVFP4Layout",
            (
                StoredPart("", "U8", PartSize(4)),
                StoredPart("_scale", "F8_E4M3", PartSize(8, columns=16)),
                StoredPart("_scale_2", "F32", PartSize(32, columns=0, rows=0)),
            ),
            "any",
            0.0952,
            row_multiple=128,
            column_multiple=64,
            in_stretches=False,
            has_one_scale=True,
        ),
    )
}
"""The most exact first. Errors: root mean square over that of normally distributed bfloat16 weights, 1024 x 3072, made and decoded by
comfy-kitchen 0.2.31. INT8 has a scale for each row (one for all rows: 0.0121). Products of FP8 need multiples of 16; blocks of scales are
laid out in tiles of 128 rows and 4 columns, which are whole for these multiples (comfy-kitchen, ``tensor/mxfp8.py``, ``nvfp4.py``)."""

ALGORITHMS = {one.algorithm: one for one in FORMATS.values()}
"""The same by the names that plans have them under."""

_DECODING_BYTES = 8
"""Of memory for an element while the host decodes a weight, as for a LoRA or where the device has no product for the format: two tensors
in float32 at most (comfy-kitchen 0.2.31, ``dequantize`` of each layout)."""

_DECODED_SHARE_OF_TRAFFIC = 2 / 3
"""A weight of a byte is read and written as two bytes before a product reads it: of three bytes two are decoded weights."""


def planned(one: HostFormat, machine: Machine, is_native: bool, missing: str = "") -> Format:
    """A format as the planner takes it.

    Args:
        one: the format.
        machine: where it is computed with.
        is_native: the device has products for it, so that nothing is decoded before them.
        missing: why this host cannot run it; empty where it can.
    """
    decoded = 0.0 if is_native else machine.rates_of(0).memory_bytes_per_s * _DECODED_SHARE_OF_TRAFFIC
    bits = sum(part.size.bits / (part.size.columns or 3072) / (part.size.rows or 3072) for part in one.parts)
    return Format(
        name=one.algorithm,
        bits_per_weight=bits,
        loss=one.loss,
        relative_error=one.relative_error,
        decode_bytes_per_s=decoded,
        note="ComfyUI's own",
        parts=tuple(part.size for part in one.parts),
        decoding_bytes=0 if is_native else _DECODING_BYTES,
        row_multiple=one.row_multiple,
        column_multiple=one.column_multiple,
        missing=missing,
    )
