"""What one pass over a component computes: operations, bytes they touch, memory they hold. Frozen values, traced or worked out."""

from __future__ import annotations

from dataclasses import dataclass

WORK_KINDS = ("matmul", "conv", "attention", "memory")
"""Kinds of operations with a rate of their own: products of matrices, convolutions, fused attention, and everything that only moves bytes
(elementwise, norms, copies, gathers)."""


@dataclass(frozen=True, slots=True)
class Work:
    """Equal operations of one call of a block, added up.

    Attributes:
        kind: one of ``WORK_KINDS``.
        dtype: in which they compute, as safetensors spells it ("BF16").
        flop: floating-point operations of all of them, a multiply-add counted as two.
        traffic_bytes: bytes that they read and write, weights included.
        weight_bytes: of these, bytes of weights; another format of the weights replaces them.
        calls: how many operations there are.
        signature: name of the operation with its shapes and dtypes, shortened; key of ``Rates.op_seconds``. Where nothing
            was traced it is a digest of the numbers above, or empty where nobody can measure the operation.
    """

    kind: str
    dtype: str
    flop: int
    traffic_bytes: int
    weight_bytes: int = 0
    calls: int = 1
    signature: str = ""


@dataclass(frozen=True, slots=True)
class BlockWork:
    """One block in one pass, all its calls added up.

    Attributes:
        works: its operations.
        activation_bytes: most bytes that were live at once while it ran, beyond those that were live when it was called.
        calls: how often it runs in a pass; 0 where this pass leaves it out.
    """

    works: tuple[Work, ...] = ()
    activation_bytes: int = 0
    calls: int = 1

    @property
    def flop(self) -> int:
        """Floating-point operations of all calls."""
        return sum(work.flop for work in self.works)


@dataclass(frozen=True, slots=True)
class PassProfile:
    """One kind of pass over a component at a workload.

    Attributes:
        name: "encode", "denoise", "decode", "prefill" or "token".
        count: how often it happens per unit of work (an image, a clip, an answer).
        activation_bytes: most bytes of activations live at once in the pass: inputs, outputs and caches included, weights not.
        cache_bytes: of these, bytes of caches that outlive the pass (keys and values, recurrent states), at the end of the work.
        blocks: work of each block of the component, in the component's order.
        outside: work of one pass outside the blocks.
        source: "traced" (the real code ran on fake tensors) or "analytic" (arithmetic over the config or the sizes).
        note: why it is analytic, in words; empty where it was traced.
    """

    name: str
    count: int
    activation_bytes: int
    blocks: tuple[BlockWork, ...] = ()
    outside: tuple[Work, ...] = ()
    cache_bytes: int = 0
    source: str = "analytic"
    note: str = ""

    @property
    def flop(self) -> int:
        """Floating-point operations of one pass."""
        return sum(block.flop for block in self.blocks) + sum(work.flop for work in self.outside)


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way of running a component that takes less memory.

    Attributes:
        name: what the host switches on: "slicing", "tiling" or "slicing+tiling".
        lossless: whether the result is the same bit for bit; tiles are blended at their seams and are not.
        profiles: the component's passes when it runs this way.
    """

    name: str
    lossless: bool
    profiles: tuple[PassProfile, ...]
