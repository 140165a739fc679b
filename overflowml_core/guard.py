"""Keeps memory below a threshold while a program goes round in a loop: cleans where it is over, and only there. Imports no torch."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from overflowml_core.errors import BadLimits, OverflowmlError, Unsupported
from overflowml_core.reading import Reading
from overflowml_core.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from overflowml_core.batches import Batch

_log = logging.getLogger("overflowml")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Item = TypeVar("_Item")

_RAM = "ram"
_WORTH = 0.01
"""Share of a memory by which more must be taken before it is cleaned again, where the last cleaning left it over the threshold: weights
that are in use stay, and looking for more than they leave takes time in every iteration."""


class OverCeiling(OverflowmlError, MemoryError):
    """This process still takes more RAM than its ceiling after everything that nobody uses was given back."""

    def __init__(self, held_bytes: int, ceiling_bytes: int) -> None:
        self.held_bytes, self.ceiling_bytes = held_bytes, ceiling_bytes
        super().__init__(
            f"host_memory={format_bytes(ceiling_bytes)}: this process holds {format_bytes(held_bytes)} of RAM, "
            "and no more can be given back; raise the ceiling, or drop results that are no longer needed"
        )


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What one cleaning gave back.

    Attributes:
        freed_bytes: by memory ("cuda:0", "ram"), what this process holds less of it; a memory that others filled meanwhile counts 0.
        crowded: the memories for which it was done.
        seconds: how long it took.
    """

    freed_bytes: dict[str, int]
    crowded: tuple[str, ...]
    seconds: float


class MemoryGuard:
    """Cleans between iterations when memory is fuller than a threshold.

    A context manager, which looks on entering and on leaving, and a decorator. One guard may be nested in itself and in others, and used by
    several threads. What the body raises is raised, whatever happens while cleaning.

    Device memory counts with what other programs take of it; so does RAM, against what this process may use. On a machine without an
    accelerator RAM alone is watched.

    Args:
        threshold: share of a memory, above 0 and at most 1, that may be taken before it is cleaned.
        verbose: log each cleaning as INFO in place of DEBUG.
        host_memory: a ceiling for the RAM that this process holds, such as "24GB" or a number of bytes (page cache does not count). Over it
            the guard cleans, and raises :class:`OverCeiling` if that is not enough.

    Attributes:
        cleanings: how often it cleaned.
        last: the last cleaning, None before the first one.
        freed_device_bytes, freed_host_bytes: given back so far.

    Raises:
        BadLimits: the threshold is no share.
        BadSize: the ceiling is no size.
    """

    def __init__(self, threshold: float = 0.7, verbose: bool = False, *, host_memory: int | str | None = None) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
            raise BadLimits(f"threshold={threshold!r}: not a share above 0 and up to 1; write 0.7 for seventy percent")
        self.threshold = float(threshold)
        self.verbose = verbose
        self.host_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory")
        self.cleanings = 0
        self.last: Cleaning | None = None
        self.freed_device_bytes = 0
        self.freed_host_bytes = 0
        self._stuck_bytes: dict[str, int] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> MemoryGuard:
        self.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.check()
        except OverCeiling as over:
            if error is None:
                raise
            _log.debug("%s (not raised: %s was on its way)", over, type(error).__name__)

    def __call__(self, function: _Function) -> _Function:
        """Guard every call of a function; a coroutine is guarded while it runs, a generator until it ends.

        Raises:
            Unsupported: it is an asynchronous generator.
        """
        if inspect.isasyncgenfunction(function):
            raise Unsupported(f"MemoryGuard on {function.__qualname__}: an asynchronous generator; write `with guard:` inside its loop")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast("_Function", awaited)
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def yielded(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return (yield from function(*args, **kwargs))

            return cast("_Function", yielded)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast("_Function", called)

    def auto_batch(self, items: Iterable[_Item], pipe_or_model: object | None = None, **options: Any) -> Iterator[Batch[_Item]]:
        """:func:`overflowml.auto_batch`, with this guard between the batches.

        Args:
            items: as there.
            pipe_or_model: as there.
            options: the others, but ``cleanup_between``.
        """
        from overflowml_core.batches import auto_batch

        return auto_batch(items, pipe_or_model, cleanup_between=self, **options)

    def clean(self) -> Cleaning:
        """Clean now, whatever the threshold.

        Returns:
            What it gave back.
        """
        with self._lock:
            return self._clean(self._read(), ())

    def check(self) -> None:
        """Clean if a memory is over the threshold, or RAM over its ceiling.

        Raises:
            OverCeiling: RAM stays over its ceiling.
        """
        with self._lock:
            before = self._read()
            crowded = tuple(one.name for one in before if self._is_crowded(one))
            if crowded:
                self._clean(before, crowded)
            if self.host_bytes is not None and self._over_ceiling(self._held_ram()):
                if not crowded:
                    self._clean(before, (_RAM,))
                held_bytes = self._held_ram()
                if self._over_ceiling(held_bytes):
                    raise OverCeiling(held_bytes, self.host_bytes)

    def _is_crowded(self, one: Reading) -> bool:
        if one.used_bytes <= self.threshold * one.total_bytes:
            self._stuck_bytes.pop(one.name, None)
            return False
        stuck_bytes = self._stuck_bytes.get(one.name)
        return stuck_bytes is None or one.used_bytes > stuck_bytes + _WORTH * one.total_bytes

    def _over_ceiling(self, held_bytes: int) -> bool:
        return self.host_bytes is not None and held_bytes > self.host_bytes

    def _clean(self, before: tuple[Reading, ...], crowded: tuple[str, ...]) -> Cleaning:
        start_s = time.perf_counter()
        gc.collect()
        if "torch" in sys.modules:
            from overflowml_core.runtime.device import trim_heap
            from overflowml_core.runtime.pressure import trim_devices

            try:
                trim_devices()
            except RuntimeError as error:
                _log.warning("memory that torch caches on the device could not be given back (%s)", _line(error))
            trim_heap()
        after = {one.name: one for one in self._read()}
        freed = {one.name: max(0, one.held_bytes - (after[one.name].held_bytes if one.name in after else 0)) for one in before}
        for name, one in after.items():
            if one.used_bytes > self.threshold * one.total_bytes:
                self._stuck_bytes[name] = one.used_bytes
        self.last = Cleaning(freed, crowded, time.perf_counter() - start_s)
        self.cleanings += 1
        self.freed_host_bytes += freed.get(_RAM, 0)
        self.freed_device_bytes += sum(nbytes for name, nbytes in freed.items() if name != _RAM)
        told = ", ".join(f"{format_bytes(nbytes)} of {name}" for name, nbytes in freed.items()) or "nothing"
        _log.log(logging.INFO if self.verbose else logging.DEBUG, "gave back %s in %.3f s", told, self.last.seconds)
        return self.last

    def _read(self) -> tuple[Reading, ...]:
        return (*_devices(), _ram())

    def _held_ram(self) -> int:
        return _ram().held_bytes


def _devices() -> tuple[Reading, ...]:
    if "torch" not in sys.modules:  # nothing of this process is on a device
        return ()
    from overflowml_core.runtime.pressure import read_devices

    try:
        return read_devices()
    except RuntimeError as error:
        _log.warning("the memory of the device cannot be read (%s); RAM alone is watched", _line(error))
        return ()


def _ram() -> Reading:
    from overflowml_core.inspect.host import anonymous_bytes, host_memory

    system = host_memory()
    return Reading(_RAM, system.total_bytes, system.available_bytes, anonymous_bytes() or 0)


def _line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]
