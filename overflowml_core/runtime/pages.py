"""Memory in whole pages of its own, as direct reads want it."""

from __future__ import annotations

import contextlib
import mmap

import torch


def whole_pages(nbytes: int) -> torch.Tensor:
    """Bytes of RAM that start on a page. Memory is taken when it is first written to, and given back when the tensor goes.

    Raises:
        MemoryError: the system has no room.
    """
    return torch.frombuffer(private_pages(nbytes), dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)


def private_pages(nbytes: int) -> mmap.mmap:
    """The same as memory of Python's own, at least one byte.

    Raises:
        MemoryError: the system has no room.
    """
    try:
        # Private: Python's default would be shared memory, which systems count and limit apart from a process's own.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of RAM: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer pages to lock for each read and to look up while computing. Kernels without huge pages refuse, which costs nothing.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
