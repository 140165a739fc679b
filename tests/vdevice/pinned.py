"""Page-locked host memory: which address ranges are pinned, and for how long."""

from __future__ import annotations

import bisect
import weakref

import torch

from .device import DEVICE, accelerator_error


class _Ranges:
    """Disjoint [start, end) address ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        at = bisect.bisect(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)

    def remove(self, start: int) -> int:
        """Drops the range that starts there and returns its size; 0 if there is none."""
        at = bisect.bisect_left(self._starts, start)
        if at == len(self._starts) or self._starts[at] != start:
            return 0
        return self._ends.pop(at) - self._starts.pop(at)

    def contain(self, start: int, end: int) -> bool:
        at = bisect.bisect(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    def overlap(self, start: int, end: int) -> bool:
        at = bisect.bisect_left(self._starts, end) - 1
        return at >= 0 and self._ends[at] > start


_allocated = _Ranges()  # live as long as their storage
_registered = _Ranges()  # live until unregister_pinned, or a reset
_by_reset: set[int] = set()  # registrations that a reset dropped: unregistering them is not an error
_storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def is_pinned(tensor: torch.Tensor, device: torch.device | None = None) -> bool:
    """What `tensor.is_pinned()` answers: whether all bytes of the host tensor lie in one pinned range."""
    start = tensor.data_ptr()
    end = start + max(tensor.nbytes, 1)
    with DEVICE.lock:
        return tensor.device.type == "cpu" and (_allocated.contain(start, end) or _registered.contain(start, end))


def pin_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Marks a host tensor that was just allocated as pinned memory, until its storage dies."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"Only dense CPU tensors can be pinned, got a tensor on {tensor.device}.")
    storage = tensor.untyped_storage()
    start, nbytes = storage.data_ptr(), storage.nbytes()
    if not nbytes:
        return tensor

    def died(_: object) -> None:
        with DEVICE.lock:
            DEVICE.refund_pinned(_allocated.remove(start))
            del _storages[start]

    with DEVICE.lock:
        DEVICE.charge_pinned(nbytes)
        _allocated.add(start, start + nbytes)
        _storages[start] = weakref.ref(storage, died)
    return tensor


def pinned_copy(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """What `tensor.pin_memory()` does."""
    return pin_storage(tensor.clone())


def register_pinned(tensor: torch.Tensor) -> None:
    """Page-locks the bytes of an existing host tensor in place, as cudaHostRegister does.

    The range stays pinned until `unregister_pinned` or the next `install`, whatever happens to the tensor.

    Raises:
        RuntimeError: it is more than may be pinned, it overlaps pinned memory, or the faults want it to fail.
        ValueError: the tensor is not contiguous host memory.
    """
    start, end = _host_range(tensor)
    with DEVICE.lock:
        if _registered.overlap(start, end) or _allocated.overlap(start, end):
            raise accelerator_error(f"vgpu error: part or all of {end - start} bytes at {start:#x} are already pinned")
        DEVICE.charge_pinned(end - start)
        _registered.add(start, end)
        _by_reset.discard(start)


def unregister_pinned(tensor: torch.Tensor) -> None:
    """Undoes `register_pinned` of a tensor with the same first byte, as cudaHostUnregister does.

    Raises:
        RuntimeError: nothing is registered there.
    """
    start, _ = _host_range(tensor)
    with DEVICE.lock:
        nbytes = _registered.remove(start)
        if not nbytes and start not in _by_reset:
            raise accelerator_error(f"vgpu error: host memory at {start:#x} has not been registered")
        _by_reset.discard(start)
        DEVICE.refund_pinned(nbytes)


def drop_registrations() -> None:
    """A reset: what an earlier test left registered is not pinned any more."""
    with DEVICE.lock:
        while _registered._starts:
            start = _registered._starts[0]
            _by_reset.add(start)
            DEVICE.refund_pinned(_registered.remove(start))


def _host_range(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        raise ValueError(
            f"expected a contiguous, non-empty host tensor, got {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    start = tensor.data_ptr()
    return start, start + tensor.nbytes
