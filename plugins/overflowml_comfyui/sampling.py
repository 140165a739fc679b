"""Measures a sampler of the host by its own wrappers: seconds of a step and the device's peak. Changes nothing of what is computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from overflowml_comfyui.measurement import Measurement

_log = logging.getLogger("overflowml")


class SamplerWatch:
    """Two wrappers around one MODEL's sampling. ``tell`` is called after each run that was neither cancelled nor failed.

    Clones of the MODEL share the watch; the host samples one graph at a time.
    """

    def __init__(self, device: Any, tell: Callable[[Measurement], None]) -> None:
        self._device, self._tell = device, tell
        self._steps = 0

    def around_sampler(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """The whole sampler, with its model loaded."""
        self._steps = 0
        counts_peak = _reset_peak(self._device)
        began_s = time.perf_counter()
        result = executor(*arguments, **named)
        _wait(self._device)
        took_s = time.perf_counter() - began_s
        if self._steps:
            measured = Measurement(took_s / self._steps, self._steps, _peak_bytes(self._device) if counts_peak else None)
            try:
                self._tell(measured)
            except Exception as error:  # noqa: BLE001 -- the picture is finished; what is said of it must not cost it
                _log.warning("what was measured is lost (%s: %s)", type(error).__name__, error)
        return result

    def around_step(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """One evaluation of the model by the sampler."""
        self._steps += 1
        return executor(*arguments, **named)


def _backend(device: Any) -> Any:
    import torch

    backend = getattr(torch, getattr(device, "type", "cpu"), None)
    return backend if hasattr(backend, "reset_peak_memory_stats") and hasattr(backend, "max_memory_allocated") else None


def _reset_peak(device: Any) -> bool:
    backend = _backend(device)
    if backend is None:
        return False
    backend.reset_peak_memory_stats(device)
    return True


def _peak_bytes(device: Any) -> int:
    return int(_backend(device).max_memory_allocated(device))


def _wait(device: Any) -> None:
    backend = _backend(device)
    if backend is not None:
        backend.synchronize(device)
