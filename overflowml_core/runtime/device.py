"""The one interface through which the runtime reaches a device: memory, copies, and the events that order them.

A device knows nothing of models. Accelerators with streams (CUDA, ROCm, XPU, and the virtual one of the tests) are one
class over torch's device module; MPS copies in order; on a machine without an accelerator the device is RAM itself.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from overflowml_core.facts import Accelerator
from overflowml_core.runtime.pages import whole_pages

_log = logging.getLogger("overflowml")
_PAGE_BYTES = 4096


class Ledger:
    """Bytes that the runtime holds in one kind of memory, now and at most. Storage that is freed is taken off by itself."""

    def __init__(self) -> None:
        # Taken again by its own thread: storage that a collection of garbage frees is booked out wherever that happens to run.
        self._lock = threading.RLock()
        self.held_bytes = 0
        self.peak_bytes = 0

    def book(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the bytes of a tensor until its storage is freed."""
        nbytes = tensor.numel() * tensor.element_size()
        with self._lock:
            self.held_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(tensor.untyped_storage(), self._unbook, nbytes)
        return tensor

    def _unbook(self, nbytes: int) -> None:
        with self._lock:
            self.held_bytes -= nbytes

    def reset_peak(self) -> None:
        """Start a new measurement from what is held now."""
        with self._lock:
            self.peak_bytes = self.held_bytes


class Device(ABC):
    """Memory that computes, the RAM beside it, and the copies between them.

    ``arenas`` counts what the runtime itself allocated on the device, ``pinned`` and ``pageable`` what it holds in RAM outside of it.
    """

    on_host = False
    """Whether the device computes in RAM, so that a block read from disk is where it is needed."""

    overlaps = False
    """Whether copies run beside what computes, so that it pays to wait for each one as late as can be."""

    pageable_holds = False
    """Whether a copy from pageable RAM holds the thread that asks for it until it is over, while the device computes on."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self.arenas = Ledger()
        self.pinned = Ledger()
        self.pageable = Ledger()

    @abstractmethod
    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes on the device.

        Raises:
            torch.OutOfMemoryError: the device has no room; on the CPU a RuntimeError or MemoryError of the allocator.
        """

    def staging(self, nbytes: int) -> torch.Tensor:
        """Allocate a staging buffer on the device; in RAM it starts on a page, so that files can be read straight into it.

        Raises:
            torch.OutOfMemoryError, MemoryError: as for ``empty``.
        """
        return self.empty(nbytes)

    @abstractmethod
    def host_buffer(self, nbytes: int, pin: bool) -> torch.Tensor:
        """Allocate bytes in RAM, page-locked where asked for and possible; a refusal falls back to pageable memory, with a warning."""

    def filled_buffer(self, nbytes: int, pin: bool, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Bytes in RAM with their content, page-locked where asked for and possible.

        Args:
            nbytes: how many.
            pin: page-lock them; a refusal falls back to pageable memory, with a warning, and loses nothing.
            fill: writes all of them, once. What it raises is raised, and nothing stays allocated.
        """
        buffer = self.host_buffer(nbytes, pin)
        fill(buffer)
        return buffer

    @abstractmethod
    def new_event(self) -> Any:
        """An event that is done until it is recorded."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Let the event mark all work that the calling thread has queued for computing so far."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any], done: Any) -> None:
        """Copy bytes to the device once the events ``after`` are done, without waiting; ``done`` marks the end of the copy."""

    @abstractmethod
    def record_copies(self, event: Any) -> None:
        """Let the event mark all copies that were queued so far."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Let what the calling thread computes from now on wait for the event; the host does not wait."""

    @abstractmethod
    def wait_on_host(self, event: Any) -> None:
        """Let the calling thread wait until the event is done."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Most bytes of the device that were taken since the last reset, measured by its allocator."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start a new measurement of the peak."""

    @abstractmethod
    def trim(self) -> None:
        """Give memory that is cached but not used back to the system."""


class HostDevice(Device):
    """RAM as the compute tier. Everything happens in order, so events have nothing to say."""

    on_host = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def empty(self, nbytes: int) -> torch.Tensor:
        return self.arenas.book(torch.empty(nbytes, dtype=torch.uint8))

    def staging(self, nbytes: int) -> torch.Tensor:
        return self.arenas.book(whole_pages(nbytes))

    def host_buffer(self, nbytes: int, pin: bool) -> torch.Tensor:
        return self.pageable.book(torch.empty(nbytes, dtype=torch.uint8))

    def new_event(self) -> None:
        return None

    def record(self, event: None) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[None], done: None) -> None:
        target.copy_(source)

    def record_copies(self, event: None) -> None:
        pass

    def wait(self, event: None) -> None:
        pass

    def wait_on_host(self, event: None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return self.arenas.peak_bytes

    def reset_peak(self) -> None:
        self.arenas.reset_peak()

    def trim(self) -> None:
        trim_heap()


class StreamDevice(Device):
    """An accelerator with copy streams and events, by torch's module for its kind (``torch.cuda``, ``torch.xpu``, ...)."""

    overlaps = True

    pageable_holds = True

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.module: Any = torch.get_device_module(torch_device)
        self._copy_stream = self.module.Stream(device=torch_device)

    def empty(self, nbytes: int) -> torch.Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        # A model may be dropped while a copy is under way; its memory must not be handed out again before that copy is over.
        buffer.record_stream(self._copy_stream)
        return self.arenas.book(buffer)

    def host_buffer(self, nbytes: int, pin: bool) -> torch.Tensor:
        if not pin:
            return self.pageable.book(torch.empty(nbytes, dtype=torch.uint8))
        try:
            return self.pinned.book(self._pinned_buffer(nbytes))
        except RuntimeError as error:
            _warn_of_refusal(nbytes, error)
            return self.pageable.book(torch.empty(nbytes, dtype=torch.uint8))

    def _pinned_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def new_event(self) -> Any:
        return self.module.Event()

    def record(self, event: Any) -> None:
        event.record(self.module.current_stream(self.torch_device))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any], done: Any) -> None:
        with self.module.stream(self._copy_stream):
            for event in after:
                self._copy_stream.wait_event(event)
            target.copy_(source, non_blocking=True)
            done.record(self._copy_stream)

    def record_copies(self, event: Any) -> None:
        event.record(self._copy_stream)

    def wait(self, event: Any) -> None:
        self.module.current_stream(self.torch_device).wait_event(event)

    def wait_on_host(self, event: Any) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self.module.synchronize(self.torch_device)

    def peak_bytes(self) -> int:
        return int(self.module.max_memory_allocated(self.torch_device))

    def reset_peak(self) -> None:
        self.module.reset_peak_memory_stats(self.torch_device)

    def trim(self) -> None:
        self.module.empty_cache()


class CudaDevice(StreamDevice):
    """CUDA and ROCm: as every device with streams, but page-locks memory in place.

    torch's own pinned allocator rounds each buffer up to a power of two, up to twice the bytes; registering keeps the plan's count exact.
    """

    def filled_buffer(self, nbytes: int, pin: bool, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        if not pin or nbytes == 0:
            return super().filled_buffer(nbytes, pin, fill)
        # Filled first: page-locking touches every page, and would zero fresh ones only for them to be written again.
        buffer = whole_pages(nbytes)
        fill(buffer)
        try:
            self._register(buffer)
        except RuntimeError as error:
            _warn_of_refusal(nbytes, error)
            return self.pageable.book(buffer)
        return self.pinned.book(buffer)

    def _pinned_buffer(self, nbytes: int) -> torch.Tensor:
        buffer = whole_pages(nbytes)
        if nbytes:
            self._register(buffer)
        return buffer

    def _register(self, buffer: torch.Tensor) -> None:
        """Page-lock a buffer that has its pages for itself: two registrations must not share one."""
        runtime, address = torch.cuda.cudart(), buffer.data_ptr()
        with torch.cuda.device(self.torch_device):
            failure = int(runtime.cudaHostRegister(address, -(-buffer.numel() // _PAGE_BYTES) * _PAGE_BYTES, 0))
        if failure:
            raise RuntimeError(f"cudaHostRegister failed with error {failure}")
        # The driver must let go before the allocator does; the finalizer runs while the storage is still there.
        weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)


class OrderedDevice(Device):
    """A device whose copies happen in order with its computing (MPS). Its memory is RAM, so little is lost by that."""

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.module: Any = torch.get_device_module(torch_device)

    def empty(self, nbytes: int) -> torch.Tensor:
        return self.arenas.book(torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device))

    def host_buffer(self, nbytes: int, pin: bool) -> torch.Tensor:
        return self.pageable.book(torch.empty(nbytes, dtype=torch.uint8))

    def new_event(self) -> None:
        return None

    def record(self, event: None) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[None], done: None) -> None:
        target.copy_(source)

    def record_copies(self, event: None) -> None:
        pass

    def wait(self, event: None) -> None:
        pass

    def wait_on_host(self, event: None) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self.module.synchronize()

    def peak_bytes(self) -> int:
        # MPS keeps no peak; what the runtime itself took is the best known.
        return self.arenas.peak_bytes

    def reset_peak(self) -> None:
        self.arenas.reset_peak()

    def trim(self) -> None:
        self.module.empty_cache()


def open_device(accelerator: Accelerator) -> Device:
    """The runtime's device for a detected accelerator, or for the CPU."""
    if accelerator.kind == "cpu":
        return HostDevice()
    torch_device = torch.device(accelerator.torch_name)
    if accelerator.kind == "cuda":
        return CudaDevice(torch_device)
    if accelerator.kind == "mps":
        return OrderedDevice(torch_device)
    return StreamDevice(torch_device)


def _warn_of_refusal(nbytes: int, error: RuntimeError) -> None:
    _log.warning("pinning %d bytes was refused (%s); copies from pageable memory are slower", nbytes, str(error))


def trim_heap() -> None:
    """Ask the C library to return free memory to the system, where it can be asked (glibc)."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:  # another C library than glibc
            _log.debug("this C library has no malloc_trim; freed memory returns to the system in its own time")
