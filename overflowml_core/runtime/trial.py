"""Runs other plans during the user's own passes and keeps the fastest. Measures and rearranges; which plan comes next others say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import Plan
from overflowml_core.runtime.compiling import keep_out_of_graphs
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.stopwatch import Kind, Stopwatch, can_measure, kind_of

_log = logging.getLogger("overflowml")

_PATIENCE = 64
"""Passes of other kinds after which a trial that waits for one more of its own is ended."""


class Contest(Protocol):
    """Says which plan to run next; see :class:`overflowml_core.planner.trial.Contest`."""

    @property
    def components(self) -> frozenset[str]:
        """Those whose passes are still to be measured."""
        ...

    @property
    def pass_s(self) -> float | None:
        """Seconds of a pass under the present plan, measured."""
        ...

    @property
    def lessons(self) -> tuple[MeasuredPass, ...]:
        """What was measured."""
        ...

    def hear(self, measured: MeasuredPass) -> Plan:
        """Take in a measured pass; the plan to run from now on."""
        ...

    def close(self) -> Plan:
        """Try nothing more; the best plan of those that were run."""
        ...

    def refuse(self, plan: Plan) -> None:
        """The plan named last could not be carried out, this one runs."""
        ...


class Trial:
    """A trial under way on one engine. It ends by itself; then no hook of it is left.

    Outputs are those of any plan: the same kernels compute with the same weights. Passes in several threads at once end it, for one of
    them may hold a slot that the other plan would move.

    Args:
        engine: attached.
        contest: knows its plan.
        learned: told at the end what was measured.
    """

    def __init__(self, engine: Engine, contest: Contest, learned: Callable[[Sequence[MeasuredPass]], None]) -> None:
        self._engine = engine
        self._contest = contest
        self._learned = learned
        self._lock = threading.RLock()
        self._inside: dict[str, int] = {}
        self._kinds: dict[str, Kind] = {}
        self._watches: dict[str, Stopwatch] = {}
        self._hooks: list[RemovableHandle] = []
        self._plan = engine.plan
        self.is_over = False

    def begin(self) -> Trial:
        """Measure from the next pass on; at once over where there is nothing to choose, or the device tells no times."""
        with self._lock:
            components = self._contest.components if can_measure(self._engine.device) else frozenset()
            for component in sorted(components):
                _, module, _ = self._engine.watched(component)
                self._hook(component, module)
                self._watch(component)
            self._engine.on_detach(self.abandon)
            if not components:
                self.abandon()
        return self

    def abandon(self) -> None:
        """End it now, under the plan that runs. A second call does nothing."""
        with self._lock:
            self.is_over = True
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            for watch in self._watches.values():
                watch.stop()
            self._watches.clear()

    def _hook(self, component: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            with self._lock:
                if not self.is_over:
                    self._enter(component, kind_of(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            with self._lock:
                if self._inside.pop(component, None) == threading.get_ident() and component in self._watches:
                    self._watches[component].end_pass()

        for hook in (before, after):
            keep_out_of_graphs(hook)
        self._hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after))

    def _enter(self, component: str, kind: Kind) -> None:
        me = threading.get_ident()
        if any(thread != me for thread in self._inside.values()):
            _log.info("the trial of plans ends: several threads call the model at once")
            self.abandon()
            return
        if self._engine.plan is not self._plan:
            _log.info("the trial of plans ends: somebody else rearranged the model")
            self.abandon()
            return
        _, module, blocks = self._engine.watched(component)
        if any(vars(part).get("_compiled_call_impl") is not None for part in (module, *blocks.values())):
            # Hooks that look at the clock have no place in a graph, and another plan would have blocks compiled anew.
            _log.info("the trial of plans ends: %s or blocks of it are compiled", component)
            self.abandon()
            return
        # A pass of this thread that is still inside was broken off, or has this component called within another one.
        self._inside.pop(component, None)
        if not self._inside and component in self._watches:
            self._decide(component, self._watches[component])
        if component in self._watches:
            self._inside[component] = me
            self._watches[component].begin_pass(kind)

    def _decide(self, component: str, watch: Stopwatch) -> None:
        found = watch.result()
        if found is not None:
            self._kinds[component], measured = found
            self._go_on(self._contest.hear(measured), component)
        elif watch.pass_count > _PATIENCE:
            self._go_on(self._contest.close(), component)

    def _go_on(self, plan: Plan, component: str) -> None:
        self._watches.pop(component).stop()
        try:
            self._engine.rearrange(plan)
        except Exception as error:  # noqa: BLE001 -- the model runs on as before, and so does the pass of the user
            _log.warning("%s could not be run in a trial (%s); the former plan goes on", plan.strategy, error)
            self._contest.refuse(self._engine.plan)
        self._plan = self._engine.plan
        if component in self._contest.components:
            self._watch(component)
        elif not self._contest.components:
            self.abandon()
            self._engine.measured_pass_s = self._contest.pass_s
            self._learned(self._contest.lessons)

    def _watch(self, component: str) -> None:
        phase, _, blocks = self._engine.watched(component)
        self._watches[component] = Stopwatch(self._engine.device, phase, component, blocks, self._kinds.get(component))
