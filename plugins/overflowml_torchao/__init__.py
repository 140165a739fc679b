"""torchao's weight-only formats, as the planner needs to know them: bits, parts, errors, and what decoding costs. Imports no torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from overflowml_core.formats import Format, PartSize
from overflowml_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from overflowml_core.codec import Codec
    from overflowml_core.facts import Machine

_ROW = 3072
"""Elements of a row that share a scale: the width of FLUX.1-dev. Scales are what makes a format of 8 bits take a little more."""

BITS = {"fp8": 8 + 32 / _ROW, "int8": 8 + 40 / _ROW, "int4": 4 + 32 / 128}
"""Bits a weight: FP8 with a float32 scale a row, INT8 with a float32 scale and a zero point a row, INT4 with a scale and a zero point of 16
bits a group of 128. Counted from the inner tensors that torchao 0.18 makes."""

PARTS = {"fp8": (PartSize(8), PartSize(32, 0)), "int8": (PartSize(8), PartSize(32, 0), PartSize(8, 0))}
"""The inner tensors of torchao 0.18's Float8Tensor and Int8Tensor: weights, scales, zero points. INT4 is forecast only."""

DECODING_BYTES = 8
"""Of memory for an element while torchao decodes a weight before the product: two tensors in float32 at most (Int8Tensor and Float8Tensor,
``dequantize``, torchao 0.18)."""

RELATIVE_ERRORS = {"fp8": 0.0265, "int8": 0.0085, "int4": 0.0998}
"""Root mean square error over root mean square of normally distributed weights, 3072 x 3072: measured with torchao 0.18's
Float8WeightOnlyConfig and Int8WeightOnlyConfig, and with asymmetric rounding in groups of 128 for INT4."""

CPU_DECODE_BYTES_PER_S = {"fp8": 0.55e9, "int8": 1.6e9}
"""bfloat16 bytes decoded a second on two cores of a cloud machine with torchao 0.18: what a product of 512 x 3072 by 3072 x 3072 takes
longer than in bfloat16. There is no INT4 kernel for every CPU, so INT4 is left out there."""

CPU_KERNEL_DTYPES = {"int8": ("BF16",)}
"""In which torch multiplies with INT8 weights on processors without decoding them first (``_weight_int8pack_mm``); the layers that torchao
makes do not use it."""

_DECODED_SHARE_OF_TRAFFIC = 2 / 3
"""A weight of one byte is read once and written once as two bytes before the product reads it: of three bytes that pass the memory two are
decoded weights. What the product itself reads is counted by the cost model already."""


@hookimpl
def overflowml_formats(machine: Machine) -> list[Format]:
    """FP8, INT8 and INT4 of linear weights; activations stay in their dtype."""
    on_cpu = machine.compute.kind == "cpu"
    decoded = machine.rates_of(0).memory_bytes_per_s * _DECODED_SHARE_OF_TRAFFIC
    return [
        Format(
            name=name,
            bits_per_weight=bits,
            loss="any" if name == "int4" else "minimal",
            relative_error=RELATIVE_ERRORS[name],
            decode_bytes_per_s=CPU_DECODE_BYTES_PER_S[name] if on_cpu else decoded,
            note="torchao weight-only",
            parts=PARTS.get(name, ()),
            decoding_bytes=DECODING_BYTES if name in PARTS else 0,
            kernel_dtypes=CPU_KERNEL_DTYPES.get(name, ()) if on_cpu else (),
            missing=_missing(name),
        )
        for name, bits in BITS.items()
        if not on_cpu or name in CPU_DECODE_BYTES_PER_S
    ]


def _missing(name: str) -> str:
    if name not in PARTS:
        return f"this version forecasts {name} and converts no weights into it"
    if importlib.util.find_spec("torchao") is None or importlib.util.find_spec("torch") is None:
        return f"{name} needs torchao, which is not installed (pip install 'overflowml[quantize]')"
    return ""


@hookimpl
def overflowml_codec(format: Format, machine: Machine) -> Codec | None:
    """What makes torchao's weight-only tensors of INT8 and FP8. On MPS there is no 8-bit floating point; the planner's traps say so."""
    if format.name not in PARTS or format.missing:
        return None
    from overflowml_torchao.codec import codec_of

    return codec_of(format)
