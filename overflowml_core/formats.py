"""Formats of weights beside the one in which they are stored: sizes, errors, and what they need. Values only; nothing is converted here."""

from __future__ import annotations

from dataclasses import dataclass

AS_STORED = ""
"""Name of no format: weights stay as they are stored."""


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
    """

    name: str
    bits_per_weight: float
    loss: str
    relative_error: float
    decode_bytes_per_s: float = 0.0
    note: str = ""
