"""What a block weighs in a format: bytes of its slab and of its experts. Pure arithmetic; nothing is converted here."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from overflowml_core.facts import Block
from overflowml_core.formats import AS_STORED, Format
from overflowml_core.layout import align
from overflowml_core.planner.cost import AS_IT_IS, Conversion

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Of the dtypes that formats convert from, as safetensors spells them. Weights in any other are packed by a format of their own already."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A block as it is on the device.

    Attributes:
        format: name of the format of its linear weights; empty where they stay as stored.
        slab_bytes: of all its weights.
        expert_bytes: of one routed expert; 0 where it has none.
        conversion: what the format does to the time of its matrix products.
    """

    format: str
    slab_bytes: int
    expert_bytes: int
    conversion: Conversion


def weigh(block: Block, chosen: Format | None) -> Weight:
    """A block in a format, or as it is stored where the format would not make it smaller or may not touch it.

    Linear weights take ``bits_per_weight`` in place of the bits of the block's prevailing floating-point dtype. Experts shrink with them
    where ``linear_count`` is so large that it must contain them.

    Args:
        block: as it is stored.
        chosen: the format, None to leave it as it is.
    """
    experts = block.experts
    as_stored = Weight(AS_STORED, block.slab_bytes, experts.nbytes if experts is not None else 0, AS_IT_IS)
    if chosen is None or block.keep_format or block.linear_count <= 0:
        return as_stored
    element_bytes = _element_bytes(block)
    if element_bytes is None or chosen.bits_per_weight >= 8 * element_bytes:
        return as_stored
    linear_bytes = min(block.linear_count * element_bytes, block.stored_bytes)
    shrink = chosen.bits_per_weight / (8 * element_bytes)
    slab_bytes = align(block.slab_bytes - linear_bytes + ceil(linear_bytes * shrink))
    if slab_bytes >= block.slab_bytes:
        return as_stored
    expert_bytes = 0
    if experts is not None:
        contained = experts.count * experts.nbytes <= linear_bytes
        expert_bytes = align(ceil(experts.nbytes * shrink)) if contained else experts.nbytes
    return Weight(chosen.name, slab_bytes, expert_bytes, Conversion(shrink, chosen.decode_bytes_per_s))


def _element_bytes(block: Block) -> int | None:
    """Bytes of an element of the linear weights; None where they are packed already."""
    if not block.bytes_by_dtype:
        mean = block.stored_bytes // block.weight_count if block.weight_count else 0
        return mean or None
    dtype, _ = max(block.bytes_by_dtype, key=lambda pair: pair[1])
    return _ELEMENT_BYTES.get(dtype)
