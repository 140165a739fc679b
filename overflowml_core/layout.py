"""Where each tensor lies in a slab (a block's flat buffer): pure arithmetic, shared by the planner's prediction and the
runtime's buffers."""

from __future__ import annotations

from collections.abc import Iterable

SLAB_ALIGNMENT_BYTES = 512
"""Start of every tensor in a slab, and granularity of its size: what torch's CUDA caching allocator hands out (kMinBlockSize), so that
kernels see in a slab what they see in a tensor of their own, and the plan counts what the allocator counts."""

EXPERT_SPARE_BYTES = 8192
"""Of a slot for an expert in RAM beyond its record: two pages, so that whole pages around it in its file are read straight into it."""


def align(nbytes: int) -> int:
    """Round bytes up to the slab alignment."""
    return -(-nbytes // SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES


def slab_offsets(sizes_bytes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Lay tensors out one after the other.

    Args:
        sizes_bytes: size of each tensor, in order.

    Returns:
        The offset of each tensor in bytes, and the size of the slab in bytes.
    """
    offsets: list[int] = []
    end = 0
    for size in sizes_bytes:
        offsets.append(end)
        end += align(size)
    return tuple(offsets), end


def slab_bytes(sizes_bytes: Iterable[int]) -> int:
    """Size in bytes of the slab that holds tensors of these sizes."""
    return slab_offsets(sizes_bytes)[1]
