"""What a block weighs in a format: bytes of its slab and of its experts. Pure arithmetic; nothing is converted here."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from overflowml_core.facts import Block
from overflowml_core.formats import AS_STORED, ELEMENT_BYTES, Format
from overflowml_core.layout import align
from overflowml_core.planner.cost import AS_IT_IS, Conversion


@dataclass(frozen=True, slots=True)
class Weight:
    """A block as it is on the device.

    Attributes:
        format: name of the format of its linear weights; empty where they stay as stored.
        slab_bytes: of all its weights.
        expert_bytes: of one routed expert; 0 where it has none.
        dense_bytes: of all its weights but the routed experts, where these are kept apart.
        conversion: what the format does to the time of its matrix products.
        workspace_bytes: that decoding its largest converted weight takes for a moment.
    """

    format: str
    slab_bytes: int
    expert_bytes: int
    conversion: Conversion
    workspace_bytes: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Change:
    """What a format does to a block: bytes of its linear weights before, and of its slab afterwards; the ratio by which the former shrink,
    the share of them that is converted, and elements of the largest converted weight."""

    linear_bytes: int
    slab_bytes: int
    shrink: float
    converted_share: float = 1.0
    largest_count: int = 0


def weigh(block: Block, chosen: Format | None) -> Weight:
    """A block in a format, or as it is stored where the format would not make it smaller or may not touch it.

    Where the shapes of its linear weights are known, and the parts that the format makes of them, the bytes of the slab are exact: those
    that the runtime lays out. Else linear weights take ``bits_per_weight`` in place of the bits of the block's prevailing floating-point
    dtype. Experts shrink with them where they are so large that they must contain them; the bytes of the block without them are an
    estimate then.

    Args:
        block: as it is stored.
        chosen: the format, None to leave it as it is.
    """
    experts = block.experts
    as_stored = Weight(AS_STORED, block.slab_bytes, experts.nbytes if experts is not None else 0, AS_IT_IS, 0, _dense_bytes(block))
    if chosen is None or block.keep_format or block.linear_count <= 0:
        return as_stored
    change = _exact(block, chosen) if block.linears and chosen.parts else _estimated(block, chosen)
    if change is None or change.slab_bytes >= block.slab_bytes:
        return as_stored
    expert_bytes, dense_bytes = 0, change.slab_bytes
    if experts is not None:
        contained = experts.count * experts.nbytes <= change.linear_bytes
        expert_bytes = align(ceil(experts.nbytes * change.shrink)) if contained else experts.nbytes
        apart_bytes = experts.count * expert_bytes if contained else block.slab_bytes - as_stored.dense_bytes
        dense_bytes = max(0, change.slab_bytes - apart_bytes)
    decoded_per_s = chosen.decode_bytes_per_s / change.converted_share
    workspace_bytes = align(change.largest_count * chosen.decoding_bytes)
    conversion = Conversion(change.shrink, decoded_per_s)
    return Weight(chosen.name, change.slab_bytes, expert_bytes, conversion, workspace_bytes, dense_bytes)


def weigh_apart(block: Block, chosen: Format | None) -> Weight:
    """A block whose routed experts wait apart from it, these in a format.

    The format is the experts' alone: they are nearly all that moves, and dense weights that stay on the device would only be slower for it.
    Bytes of an expert are exact: those of the record that the runtime lays out. Where the shapes of an expert's matrices are not known, the
    block is weighed as a whole.

    Args:
        block: as it is stored.
        chosen: the format, None to leave it as it is.
    """
    experts = block.experts
    if chosen is None or experts is None or not experts.matrices or not chosen.parts:
        return weigh(block, chosen)
    as_stored = weigh(block, None)
    converted = [one for one in experts.matrices if chosen.converts(one.rows, one.columns, one.dtype)]
    if block.keep_format or not converted:
        return as_stored
    before = [one.rows * one.columns * ELEMENT_BYTES[one.dtype] for one in converted]
    saved = [align(nbytes) - chosen.slab_bytes(one.rows, one.columns) for one, nbytes in zip(converted, before, strict=True)]
    expert_bytes = experts.nbytes - sum(one.count * nbytes for one, nbytes in zip(converted, saved, strict=True))
    # Of what a token reads of the block, its experts shrink.
    share = experts.per_token * experts.nbytes / (experts.per_token * experts.nbytes + as_stored.dense_bytes)
    has_kernel = all(one.dtype in chosen.kernel_dtypes for one in converted)
    decode_bytes_per_s = 0.0 if has_kernel else chosen.decode_bytes_per_s / share
    return Weight(
        format=chosen.name,
        slab_bytes=as_stored.dense_bytes + experts.count * expert_bytes,
        expert_bytes=expert_bytes,
        conversion=Conversion(1 - share * (1 - expert_bytes / experts.nbytes), decode_bytes_per_s),
        workspace_bytes=align(max(one.rows * one.columns for one in converted) * chosen.decoding_bytes),
        dense_bytes=as_stored.dense_bytes,
    )


def _dense_bytes(block: Block) -> int:
    experts = block.experts
    if experts is None:
        return block.slab_bytes
    # A size without tensors behind it has no layout: experts may then take more than their block by their alignment.
    return experts.dense_bytes or max(0, block.slab_bytes - experts.count * experts.nbytes)


def _exact(block: Block, chosen: Format) -> _Change | None:
    before = after = converted = largest = 0
    slab = block.slab_bytes
    for linear in block.linears:
        nbytes = linear.rows * linear.columns * ELEMENT_BYTES.get(linear.dtype, 0)
        before += linear.count * nbytes
        if not chosen.converts(linear.rows, linear.columns, linear.dtype):
            after += linear.count * nbytes
            continue
        converted += linear.count * nbytes
        largest = max(largest, linear.rows * linear.columns)
        after += linear.count * sum(part.nbytes(linear.rows, linear.columns) for part in chosen.parts)
        slab += linear.count * (chosen.slab_bytes(linear.rows, linear.columns) - align(nbytes))
    return _Change(before, slab, after / before, converted / before, largest) if converted else None


def _estimated(block: Block, chosen: Format) -> _Change | None:
    element_bytes = _element_bytes(block)
    if element_bytes is None or chosen.bits_per_weight >= 8 * element_bytes:
        return None
    linear_bytes = min(block.linear_count * element_bytes, block.stored_bytes)
    shrink = chosen.bits_per_weight / (8 * element_bytes)
    return _Change(linear_bytes, align(block.slab_bytes - linear_bytes + ceil(linear_bytes * shrink)), shrink)


def _element_bytes(block: Block) -> int | None:
    """Bytes of an element of the linear weights; None where they are packed already."""
    if not block.bytes_by_dtype:
        mean = block.stored_bytes // block.weight_count if block.weight_count else 0
        return mean or None
    dtype, _ = max(block.bytes_by_dtype, key=lambda pair: pair[1])
    return ELEMENT_BYTES.get(dtype)
