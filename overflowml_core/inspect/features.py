"""What hardware can compute in, by the number its vendor gives its instruction set. Knows no device and no driver."""

from __future__ import annotations

import re

_CUDA_FROM = (("int8", (7, 5)), ("bf16", (8, 0)), ("fp8", (8, 9)), ("nvfp4", (10, 0)))
"""Compute capability from which tensor cores take a dtype (CUDA C++ Programming Guide, tables of arithmetic instructions and of
tensor core features by capability)."""

_GFX_FP8 = ("gfx942", "gfx950", "gfx12")
_GFX_WITHOUT_MATRIX = ("gfx9", "gfx10")
_GFX_MATRIX = ("gfx908", "gfx90a", "gfx94", "gfx95")
"""Families by their instruction set guides: matrix cores from gfx908 (CDNA), WMMA from gfx11 (RDNA 3), FP8 in gfx942, gfx950 and gfx12."""


def features_of(backend: str, capability: str) -> frozenset[str]:
    """Dtypes that the hardware computes in by itself: of "bf16", "fp8", "int8", "nvfp4"; empty where the capability tells nothing.

    Args:
        backend: as in ``Accelerator.backend``.
        capability: "8.9" for CUDA, "gfx1100" for ROCm; the other backends have none to tell apart.
    """
    if backend == "cuda":
        numbers = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", capability)
        found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        return frozenset(name for name, least in _CUDA_FROM if found >= least)
    if backend == "rocm":
        return _of_gfx(capability)
    if backend == "xpu":  # every GPU that torch's XPU backend supports has XMX units (torch documentation, Intel GPU prerequisites)
        return frozenset({"bf16", "int8"})
    if backend == "mps":  # Metal has bfloat since macOS 14, which torch requires
        return frozenset({"bf16"})
    return frozenset()


def _of_gfx(capability: str) -> frozenset[str]:
    if not capability.startswith("gfx"):
        return frozenset()
    if capability.startswith(_GFX_WITHOUT_MATRIX) and not capability.startswith(_GFX_MATRIX):
        return frozenset()
    return frozenset({"bf16", "int8"} | ({"fp8"} if capability.startswith(_GFX_FP8) else set()))
