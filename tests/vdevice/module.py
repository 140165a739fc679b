"""`torch.vgpu`: the names of torch.cuda that programs use, with the same meaning, for the virtual accelerator.

This module itself is registered with torch as the device's module, so its public functions are the interface.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace, TracebackType
from typing import Any, TypeAlias

import torch

from .clock import EventState, StreamState
from .config import DEVICE_NAME
from .device import DEVICE
from .internals import PRIVATE_USE_1

OutOfMemoryError = torch.OutOfMemoryError
_Where: TypeAlias = "torch.device | str | int | None"


def _check(device: _Where) -> None:
    """Refuses any device but the one there is."""
    if device is None or device == 0:
        return
    given = torch.device(DEVICE_NAME, device) if isinstance(device, int) else torch.device(device)
    if given.type != DEVICE_NAME or given.index not in (None, 0):
        raise ValueError(f"expected {DEVICE_NAME}:0, the only device of this module, got {given}")


# ---- streams and events


class Event:
    """As torch.cuda.Event, on the simulated clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, device: _Where = None) -> None:
        _check(device)
        self._state = EventState()
        self._timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        DEVICE.clock.record(self._state, _state(stream))

    def wait(self, stream: Stream | None = None) -> None:
        DEVICE.clock.wait(self._state, _state(stream))

    def synchronize(self) -> None:
        DEVICE.clock.synchronize(self._state)

    def query(self) -> bool:
        """Whether the event is reached. A "no" costs the host `Config.poll_s`, so a loop that asks comes to its end."""
        return DEVICE.clock.query(self._state)

    def elapsed_time(self, end_event: Event) -> float:
        """Simulated milliseconds from this event to the other."""
        if not (self._timed and end_event._timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if not (self._state.recorded and end_event._state.recorded):
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event._state.time_s - self._state.time_s) * 1e3


class Stream(torch.Stream):  # type: ignore[misc]
    """As torch.cuda.Stream. Two objects with the same stream_id are the same stream."""

    def __new__(cls, device: _Where = None, priority: int = 0, *, stream_id: int | None = None, **_: Any) -> Stream:
        _check(device)
        stream_id = DEVICE.clock.new_stream() if stream_id is None else stream_id
        stream: Stream = super().__new__(cls, stream_id=stream_id, device_index=0, device_type=PRIVATE_USE_1)
        return stream

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done in __new__; torch.Stream has no __init__ that takes arguments."""

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        DEVICE.clock.synchronize(_state(self))

    def query(self) -> bool:
        return DEVICE.clock.query(_state(self))

    def __enter__(self) -> Stream:
        context = StreamContext(self)
        _entered.stack.append(context)
        context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        _entered.stack.pop().__exit__(None, None, None)


class StreamContext:
    """The calling thread works on `stream` inside the `with`; None changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream
        self._previous = 0

    def __enter__(self) -> None:
        if self._stream is not None:
            self._previous = DEVICE.clock.set_current(self._stream.stream_id)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._stream is not None:
            DEVICE.clock.set_current(self._previous)


class _Entered(threading.local):
    def __init__(self) -> None:
        self.stack: list[StreamContext] = []


_entered = _Entered()


def _state(stream: Stream | None) -> StreamState:
    return DEVICE.clock.current() if stream is None else DEVICE.clock.streams[stream.stream_id]


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        DEVICE.clock.set_current(stream.stream_id)


def current_stream(device: _Where = None) -> Stream:
    _check(device)
    return Stream(stream_id=DEVICE.clock.current().id)


def default_stream(device: _Where = None) -> Stream:
    _check(device)
    return Stream(stream_id=0)


def synchronize(device: _Where = None) -> None:
    _check(device)
    DEVICE.synchronize()


# ---- the device


def init() -> None:
    """Nothing to start."""


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: _Where) -> None:
    _check(device)


class device:
    """Context manager that selects the device; there is only one."""

    def __init__(self, device: _Where) -> None:
        _check(None if device == -1 else device)

    def __enter__(self) -> None:
        """Nothing to select."""

    def __exit__(self, *_: object) -> None:
        """Nothing to select."""


def get_device_name(device: _Where = None) -> str:
    return "virtual accelerator"


def get_device_capability(device: _Where = None) -> tuple[int, int]:
    return 9, 0


def get_device_properties(device: _Where = None) -> SimpleNamespace:
    _check(device)
    major, minor = get_device_capability()
    return SimpleNamespace(
        name=get_device_name(),
        total_memory=DEVICE.config.budget_bytes,
        major=major,
        minor=minor,
        multi_processor_count=1,
    )


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


# ---- memory; nothing is cached unless the device is shared, so what is reserved is what is allocated


def memory_allocated(device: _Where = None) -> int:
    return DEVICE.allocated_bytes


def max_memory_allocated(device: _Where = None) -> int:
    return DEVICE.peak_bytes


def memory_reserved(device: _Where = None) -> int:
    return DEVICE.reserved_bytes


def max_memory_reserved(device: _Where = None) -> int:
    return DEVICE.peak_bytes


def reset_peak_memory_stats(device: _Where = None) -> None:
    DEVICE.peak_bytes = DEVICE.allocated_bytes


def mem_get_info(device: _Where = None) -> tuple[int, int]:
    """Free and total bytes."""
    return DEVICE.free_bytes(), DEVICE.total_bytes()


def empty_cache() -> None:
    """Give others what is kept of a shared device; else nothing is cached."""
    DEVICE.empty_cache()


def ipc_collect() -> None:
    """Nothing is shared."""


# ---- random numbers: operators run on the CPU and draw from the CPU's generator


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def get_rng_state(device: _Where = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: _Where = None) -> None:
    torch.set_rng_state(new_state)


# ---- what torch asks of a device module


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    """Nothing to start."""
