"""Watches an engine whose experts wait outside of the device, and saves what it counts. Does not keep the model alive."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from overflowml_core.errors import OverflowmlError
from overflowml_core.expert_report import ExpertReport
from overflowml_core.heat import Run
from overflowml_core.heat_store import Save, save_run

if TYPE_CHECKING:
    from torch import nn

    from overflowml_core.runtime.engine import Engine

_log = logging.getLogger("overflowml")

_LOOK_S, _SAVE_S = 1.0, 60.0
"""Seconds between two looks at the counts, and between two saves, at least. What the last look saw is saved when the model is let go
without being released: nothing can be asked of it then."""


class HeatRecorder:
    """Saves the counts of one attachment: now and then after a pass, when it is detached, when the model is let go, and at exit.

    Args:
        engine: attached; only a weak reference to it is kept.
        source: where the model came from, for people.
    """

    def __init__(self, engine: Engine, source: str) -> None:
        self._engine = weakref.ref(engine)
        self._network = engine.network.fingerprint, engine.network.class_name
        self._source, self._device = source, engine.plan.device
        self._key = f"{os.getpid():x}-{time.time_ns():x}"
        self._lock = threading.Lock()
        self._began: dict[int, float] = {}
        self._pass_s = 0.0
        self._looked_s = self._saved_s = time.monotonic()
        self._seen: ExpertReport | None = None
        self._saved: ExpertReport | None = None
        self._hooks: list[Any] = []

    def begin(self, modules: Iterable[nn.Module]) -> HeatRecorder:
        """Record from the next pass on.

        Args:
            modules: of the components that have experts outside of the device.
        """
        engine = self._engine()
        if engine is None:
            return self
        for module in modules:
            self._watch(module)
        engine.on_detach(self.end)
        weakref.finalize(engine, self._flush)  # also runs at exit, while the engine is there still
        return self

    def end(self) -> None:
        """Save, and record no more. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._flush()

    def _watch(self, module: nn.Module) -> None:
        from overflowml_core.runtime.compiling import keep_out_of_graphs

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._began[threading.get_ident()] = time.perf_counter()

        def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            self._passed(self._began.pop(threading.get_ident(), None))

        hooks: tuple[Callable[..., Any], ...] = (before, after)
        for hook in hooks:
            keep_out_of_graphs(hook)
        self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
        self._hooks.append(module.register_forward_hook(after))

    def _passed(self, began_s: float | None) -> None:
        now_s = time.monotonic()
        with self._lock:
            if began_s is not None:
                self._pass_s += time.perf_counter() - began_s
            if now_s < self._looked_s + _LOOK_S:
                return
            self._looked_s = now_s
            self._look()
            if now_s >= self._saved_s + _SAVE_S:
                self._saved_s = now_s
                self._save()

    def _flush(self) -> None:
        with self._lock:
            self._look()
            self._save()

    def _look(self) -> None:
        engine = self._engine()
        if engine is None:
            return
        try:
            report = engine.expert_report()
        except OverflowmlError as error:
            _log.warning("the experts' counts cannot be read (%s); those of the last look are kept", error)
            return
        if report is not None:
            self._seen = report

    def _save(self) -> None:
        seen = self._seen
        if seen is None or not seen.tokens or seen == self._saved:
            return
        run = Run(self._key, self._source, self._device, time.time(), self._pass_s, seen)
        if save_run(Save(*self._network, run, self._saved)):
            self._saved = seen
