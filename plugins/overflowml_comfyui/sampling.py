"""Measures a sampler of the host by its own wrappers: seconds, passes, the device's peak. Changes nothing of what is computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from overflowml_comfyui.measurement import Measurement

_log = logging.getLogger("overflowml")


class SamplerWatch:
    """Wrappers around one MODEL's sampling. ``tell`` is called after each run that was neither cancelled nor failed.

    Clones of the MODEL share the watch; the host samples one graph at a time.

    Args:
        device: that computes.
        tell: hears of each run, with the shape of the latents that it sampled; empty where the host did not say.
        weights: bytes of the model's weights on the device and outside it, asked when the sampler begins with its model loaded.
    """

    def __init__(
        self, device: Any, tell: Callable[[Measurement, tuple[int, ...]], None], weights: Callable[[Any], tuple[int, int]] | None = None
    ) -> None:
        self._device, self._tell, self._weights = device, tell, weights
        self._steps = self._passes = 0
        self._shapes: set[tuple[int, ...]] = set()

    def around_sampler(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """The whole sampler, with its model loaded. The first argument is the host's guider, which holds the model; the fifth is noise."""
        self._steps = self._passes = 0
        self._shapes = set()
        counts_peak = _reset_peak(self._device)
        resident_bytes, streamed_bytes = self._weight_bytes(arguments)
        began_s = time.perf_counter()
        result = executor(*arguments, **named)
        _wait(self._device)
        took_s = time.perf_counter() - began_s
        if self._steps:
            peak_bytes = _peak_bytes(self._device) if counts_peak else None
            shape = self._shapes.pop() if len(self._shapes) == 1 else None
            passes, samples = (self._passes, shape[0]) if shape else (0, 0)
            measured = Measurement(took_s / self._steps, self._steps, peak_bytes, passes, samples, resident_bytes, streamed_bytes)
            try:
                self._tell(measured, _shape_of(arguments[4]) if len(arguments) > 4 else ())
            except Exception as error:  # noqa: BLE001 -- the picture is finished; what is said of it must not cost it
                _log.warning("what was measured is lost (%s: %s)", type(error).__name__, error)
        return result

    def around_step(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """One evaluation of the model by the sampler."""
        self._steps += 1
        return executor(*arguments, **named)

    def around_pass(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """One call of the model: several of them may make a step, or one may carry the batch twice, as guidance has it."""
        self._passes += 1
        self._shapes.add(_shape_of(arguments[0]) if arguments else ())
        return executor(*arguments, **named)

    def _weight_bytes(self, arguments: tuple[Any, ...]) -> tuple[int, int]:
        if self._weights is None or not arguments:
            return 0, 0
        try:
            return self._weights(arguments[0])
        except Exception as error:  # noqa: BLE001 -- another pack's patcher may not count; that must not cost the picture
            _log.warning("the model's weights on the device are not counted (%s: %s)", type(error).__name__, error)
            return 0, 0


def _shape_of(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in getattr(tensor, "shape", ()))


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
