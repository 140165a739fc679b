"""Tells an error that a smaller batch may cure from all others. Imports no torch."""

from __future__ import annotations

import sys

from overflowml_core.errors import DoesNotFit

_WORDS = (
    "out of memory",  # CUDA, ROCm, XPU and MPS, where they raise a plain RuntimeError
    "can't allocate memory",  # torch's allocator of the CPU
    "not enough memory",  # the same on Windows
    "_ALLOC_FAILED",  # cuBLAS and cuDNN
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out while something computed.

    A plan that does not fit is none of these: it does not depend on the batch.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DoesNotFit):
            return False
        if isinstance(error, MemoryError) or _is_torchs(error):
            return True
        error = error.__cause__
    return False


def _is_torchs(error: BaseException) -> bool:
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
