"""Whose turn it is: a phase leaves the device only when no other thread computes with it. Knows phases by their modules; moves nothing.

Note [frames]. Who is inside a call is read from the threads' own frames whenever a phase is to leave, and not counted by whoever comes and
goes: a count would be wrong for ever once an interrupt fell between two lines, and a thread that dies would keep its place.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.forks import refusal
from overflowml_core.runtime.phase import Phase, Stay

_LOOK_AGAIN_S = 0.002
"""Who waits for a turn looks this often; a change of phases takes longer."""

_RUNTIME = __name__.rpartition(".")[0]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_calls: set[CodeType] = set()


def is_call(function: _Function) -> _Function:
    """Mark a function that stands around a module's method: while it runs, its thread is inside the module that it knows as ``module``."""
    _calls.add(function.__code__)  # type: ignore[attr-defined]
    return function


class Turns:
    """Turns of the phases of one engine on its device.

    A thread that wants another phase closes the door of the one that is there: who is inside goes on, who comes waits behind it, so that no
    thread can keep a phase for itself by calling it again and again. First come, first served.
    """

    def __init__(self, switch: threading.RLock, phases: Iterable[Phase]) -> None:
        """Nobody waits yet.

        Args:
            switch: held while phases change.
            phases: of the engine, also those that are added.
        """
        self.switch = switch
        self._condition = threading.Condition(switch)
        self._phases = phases
        self._queue: list[int] = []
        """Threads that wait, by ident; one that was interrupted may stay in it and is left out."""
        self._is_forked = False

    def forked(self) -> threading.RLock:
        """In a process that was forked from the engine's: nobody gets a turn any more.

        Returns:
            The switch from now on; a thread that is not there may hold the other one for ever.
        """
        self._is_forked = True
        self.switch = threading.RLock()
        return self.switch

    @property
    def present(self) -> Phase | None:
        """The phase that is on the device."""
        return next((phase for phase in self._phases if phase.stay is Stay.THERE), None)

    def take(self, wanted: Phase | None) -> None:
        """Wait until a phase may have the device; the caller holds the switch, which others may take while it waits.

        Args:
            wanted: that phase; None where the present one is only to leave.

        Raises:
            Unsupported: this thread is inside a call of the present phase, and all others that are wait themselves; or the process was
                forked from that of the model.
        """
        if self._is_forked:
            raise refusal()
        _uncompiled(self._take)(wanted)

    def _take(self, wanted: Phase | None) -> None:
        me = threading.get_ident()
        try:
            while self._must_wait(me, wanted):
                if me not in self._queue:
                    self._queue.append(me)
                self._condition.wait(_LOOK_AGAIN_S)
        finally:
            if me in self._queue:
                self._queue.remove(me)

    def is_alone(self, phase: Phase) -> bool:
        """Whether no other thread is inside a phase; the caller holds the switch. From then on nobody comes in before it is let go.

        Raises:
            Unsupported: the process was forked from that of the model.
        """
        if self._is_forked:
            raise refusal()
        was_open, phase.is_present = phase.is_present, False
        if _uncompiled(_inside)(_other_frames(), phase, ()):
            phase.is_present = was_open
            return False
        return True

    def refuse_inside(self) -> None:
        """Let only those end the model who are not inside a call of it.

        Raises:
            Unsupported: the calling thread is.
        """
        if any(_depth(sys._getframe(), phase.modules) for phase in self._phases):
            raise Unsupported("the model is given back inside a call of it, which needs its weights; release it when the call is over")

    def _must_wait(self, me: int, wanted: Phase | None) -> bool:
        present = self.present
        if present is None:
            return False
        frames = _other_frames()
        waiting = [ident for ident in self._queue if ident == me or _runs(frames.get(ident), "take")]
        ahead = waiting[: waiting.index(me)] if me in waiting else waiting
        depth = _depth(sys._getframe(), present.modules)
        if present is wanted:
            # One call deep is who comes: only that call's first hook ran. Who is inside must go on, for others wait until it has left.
            if ahead and depth < 2:
                return True
            present.is_present = not waiting or waiting == [me]
            return False
        present.is_present = False
        others = _inside(frames, present, waiting)
        if not others:
            return bool(ahead) and not depth
        if depth and all(_runs(frames[ident], "_slot_for") for ident in others):
            what = wanted.plan.name if wanted is not None else "a change of its weights"
            raise Unsupported(
                f"{what} is called for inside a call of {present.plan.name} for which other threads wait; "
                "call one after the other, or give the budget room for both"
            )
        return True


def _uncompiled(function: _Function) -> _Function:
    """The function, out of reach of ``torch.compile`` where somebody uses it: a frame is no value that a graph could hold, and Dynamo fails
    over it."""
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)  # type: ignore[no-any-return]


def _other_frames() -> dict[int, FrameType]:
    """What other threads run. Without one's own frame: whoever keeps that in a variable keeps all its variables until the next collection
    of garbage, and tensors with them."""
    me = threading.get_ident()
    return {ident: frame for ident, frame in sys._current_frames().items() if ident != me}


def _inside(frames: Mapping[int, FrameType], phase: Phase, apart: Collection[int]) -> list[int]:
    return [ident for ident, frame in frames.items() if ident not in apart and _depth(frame, phase.modules)]


def _depth(frame: FrameType | None, roots: Iterable[nn.Module]) -> int:
    """How many calls of these modules and their parts a frame is inside of."""
    called: list[object] = []
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl":  # what torch's Module has as __call__
            called.append(frame.f_locals.get("self"))
        elif frame.f_code in _calls:
            called.append(frame.f_locals.get("module"))
        frame = frame.f_back
    if not called:
        return 0
    parts = {id(part) for root in roots for part in root.modules()}
    return sum(id(module) in parts for module in called)


def _runs(frame: FrameType | None, name: str) -> bool:
    """Whether a function of the runtime is among those that a frame is inside of."""
    while frame is not None and not (frame.f_code.co_name == name and frame.f_globals.get("__name__", "").startswith(_RUNTIME)):
        frame = frame.f_back
    return frame is not None
