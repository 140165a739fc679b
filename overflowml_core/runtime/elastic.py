"""Elastic residency: resident blocks are streamed from when memory runs out until there is enough again. Says when; moves nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.elastic_state import CallState
from overflowml_core.runtime.events import Events
from overflowml_core.runtime.lighter import Lighten, Lighter
from overflowml_core.runtime.phase import Phase
from overflowml_core.runtime.room import with_room
from overflowml_core.runtime.turns import Turns, is_call
from overflowml_core.units import format_bytes

_PATIENCE_PASSES = 4
"""Passes without a shortage before blocks come back; doubled whenever they had to leave again soon after."""
_MOST_PATIENCE_PASSES = 1024


class Elastic:
    """Makes room in the phases of one engine and takes it back.

    Note [shortage]. Two places meet it. Where a phase comes onto the device no code of the model ran: it is tried again with less until it
    fits. Inside a call of a component the call is made again where everything is as it was before (note [again] in elastic_state.py);
    else the error goes to the caller, and the next call has the room. Each time twice as much is given free, so that few attempts do.
    Where no block can leave any more, a host may have a way for calls to take less, as a VAE's tiles (see lighter.py).
    """

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        go_under: Callable[[Phase, PhasePlan], None],
        bring: Callable[[Phase], None],
        turns: Turns,
    ) -> None:
        """Do nothing yet.

        Args:
            device: what computes.
            budget_bytes: of the plan.
            go_under: has a phase go on under another plan; it leaves the device for it.
            bring: has a phase on the device.
            turns: knows who computes with a phase.
        """
        self.events = Events()
        self._device = device
        self._budget_bytes = budget_bytes
        self._go_under = go_under
        self._bring = bring
        self._turns = turns
        self._under_way: set[object] = set()
        """A mark for each call that is inside."""
        self._full: dict[int, tuple[PhasePlan, PhasePlan]] = {}
        """By id of a phase that was demoted: its plan before, and the one since."""
        self._lighters: dict[int, Lighter] = {}
        """By id of a component what its host can do."""
        self._good_passes = 0
        self._patience_passes = _PATIENCE_PASSES
        self._is_probation = False

    def enter(self, phase: Phase) -> None:
        """Have a phase on the device that is not there, with as many resident blocks as there is room for.

        Raises:
            torch.OutOfMemoryError: there is no room even for the least.
            ReadFault: a file is gone or shorter than it was.
        """
        step_bytes = 0
        while True:
            try:
                phase.enter()
            except torch.OutOfMemoryError as error:
                step_bytes = self.demote(phase, step_bytes, f"no room for {phase.plan.name}: {_first_line(error)}")
                if not step_bytes:
                    raise
            else:
                return

    def demote(self, phase: Phase, former_bytes: int, reason: str) -> int:
        """Stream blocks of a phase that were resident, or give up staging, whose place nothing then takes.

        Args:
            phase: with which no other thread may compute; one that does keeps it as it is.
            former_bytes: what the last attempt for the same shortage gave free, 0 for the first.
            reason: for the record.

        Returns:
            Bytes that are free now; 0 where nothing is left to give, or the move itself failed.
        """
        with self._turns.switch, torch.inference_mode(False), torch.no_grad():
            before, wanted = phase.plan, self._with_less(phase, former_bytes * 2)
            if wanted is None or not self._turns.is_alone(phase):
                return 0
            full, since = self._full.get(id(phase), (before, before))
            self._go_under(phase, wanted)
            self._full[id(phase)] = (full if since == before else before, phase.plan)
            self._device.trim()
            freed_bytes = before.device_bytes - phase.plan.device_bytes
            self._learn()
            moved = before.resident_bytes - phase.plan.resident_bytes
            self.events.add(
                "demoted",
                f"{phase.plan.name}: {format_bytes(moved)} of residents are streamed, {format_bytes(freed_bytes)} are free ({reason})",
                freed_bytes,
            )
            return max(freed_bytes, 1)

    def _with_less(self, phase: Phase, nbytes: int) -> PhasePlan | None:
        plan = phase.plan
        if phase.casts:
            return None  # homes in another dtype belong to no plan
        nbytes = nbytes or max((p.stored_bytes for p in plan.placements), default=0)
        while nbytes:
            found = with_room(plan, self._budget_bytes - plan.device_bytes + nbytes, self._budget_bytes)
            if found is not None and found.device_bytes < plan.device_bytes:
                return found
            nbytes //= 2
        return None

    def _learn(self) -> None:
        if self._is_probation:
            self._patience_passes = min(self._patience_passes * 2, _MOST_PATIENCE_PASSES)
        self._good_passes, self._is_probation = 0, False

    def _promote(self, phase: Phase) -> None:
        """Have a phase as it was before, where memory was enough for a while and the device has room for that now."""
        full, since = self._full[id(phase)]
        if phase.plan != since:
            del self._full[id(phase)]  # somebody rearranged it meanwhile
            return
        self._good_passes += 1
        if self._is_probation or self._good_passes < self._patience_passes:
            return
        self._good_passes = 0
        wanted_bytes = full.device_bytes - since.device_bytes
        # Activations are not there between two calls, and will be.
        if self._free_bytes() < wanted_bytes + max(full.activation_bytes, full.slot_bytes) or not self._turns.is_alone(phase):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._go_under(phase, full)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._is_probation = True
            self._learn()
            self._full[id(phase)] = (full, phase.plan)
            self.events.add("demoted", f"{full.name}: blocks could not come back ({_first_line(error)})")
            return
        del self._full[id(phase)]
        self._is_probation = True
        self.events.add("promoted", f"{full.name}: the device has {format_bytes(wanted_bytes)} again", wanted_bytes)

    def _free_bytes(self) -> int:
        """What the driver has left beside all programs, and what torch holds of the device without using it."""
        where, module = self._device.torch_device, torch.get_device_module(self._device.torch_device)
        free_bytes = int(module.mem_get_info(where)[0])
        return free_bytes + int(module.memory_reserved(where)) - int(module.memory_allocated(where))

    def on_shortage(self, module: nn.Module, host: Lighten) -> None:
        """Have a host make a component's calls lighter where nothing else helps.

        Args:
            module: the component.
            host: what it can do; whoever calls this takes it back in the end.
        """
        self._lighters[id(module)] = Lighter(host, _PATIENCE_PASSES, _MOST_PATIENCE_PASSES)

    def _have_less(self, phase: Phase, module: nn.Module, work: functools.partial[Any], former_bytes: int, reason: str) -> int | None:
        """Have the next call of a component find more room, or take less. What changes no result comes first.

        Returns:
            Bytes that are free now; None where there is nothing left to do.
        """
        freed_bytes = self.demote(phase, former_bytes, reason)
        if freed_bytes:
            return freed_bytes
        lighter = self._lighters.get(id(module))
        if lighter is None or self._with_less(phase, 0) is not None:  # a block could leave, and another thread computes with it
            return None
        told = lighter.step((*work.args, *work.keywords.values()))
        if not told:
            return None
        self.events.add("lightened", f"{type(module).__name__}: {told}")
        return 0

    def _take_back_steps(self, module: nn.Module) -> None:
        lighter = self._lighters.get(id(module))
        if lighter is not None and lighter.is_due:
            lighter.take_back()
            self.events.add("unlightened", f"{type(module).__name__}: memory was enough for a while; it runs as it did before")

    def follow(self, phase: Phase, module: nn.Module) -> Callable[[], None]:
        """Have the calls of a component survive a shortage, as far as that can be right.

        Args:
            phase: of the component.
            module: the component; its ``forward``, and ``encode`` and ``decode`` where it has them.

        Returns:
            A function that takes it back.
        """
        undo = [self._wrap(phase, module, name) for name in ("encode", "decode", "forward") if callable(getattr(type(module), name, None))]

        def take_back() -> None:
            while undo:
                undo[-1]()
                undo.pop()

        return take_back

    def _wrap(self, phase: Phase, module: nn.Module, name: str) -> Callable[[], None]:
        namespace, original = vars(module), getattr(module, name)
        before = namespace.get(name)

        @is_call
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._survive(phase, module, functools.partial(original, *args, **kwargs))

        namespace[name] = call

        def undo() -> None:
            if namespace.get(name) is call:
                if before is None:
                    del namespace[name]
                else:
                    namespace[name] = before

        return undo

    def _survive(self, phase: Phase, module: nn.Module, work: functools.partial[Any]) -> Any:
        mark = object()
        try:
            self._under_way.add(mark)
            if len(self._under_way) > 1:  # inside another call, which makes itself again, or beside one, whose blocks stay
                return work()
            if self._full:
                with self._turns.switch:
                    if id(phase) in self._full:
                        self._promote(phase)
            self._take_back_steps(module)
            if not phase.is_present:
                self._bring(phase)
            return self._run(phase, module, work)
        finally:
            self._under_way.discard(mark)  # which, unlike a count, may be done whatever an interrupt left out

    def _run(self, phase: Phase, module: nn.Module, work: functools.partial[Any]) -> Any:
        freed_bytes = 0
        while self._with_less_is_possible(phase) or id(module) in self._lighters:
            state = CallState(module, (*work.args, *work.keywords.values()), phase.moved_buffers())
            try:
                result = work()
            except torch.OutOfMemoryError as error:
                is_alone = len(self._under_way) == 1
                reason = _first_line(error)
                obstacle = state.put_back() if is_alone else "another call was under way"
                if obstacle:
                    self.events.add("not retried", f"{type(module).__name__}: {reason}; {obstacle}")
                    if is_alone:
                        self._have_less(phase, module, work, freed_bytes, reason)
                    raise
            else:
                self._is_probation = False
                if id(module) in self._lighters:
                    self._lighters[id(module)].succeeded()
                return result
            # Outside the handler: the frames of what failed hold its activations.
            given_bytes = self._have_less(phase, module, work, freed_bytes, reason)
            if given_bytes is None:
                raise torch.OutOfMemoryError(f"{reason}; no block of {type(module).__name__} can leave the device any more")
            freed_bytes = given_bytes
            self._bring(phase)
            self.events.add("retried", f"{type(module).__name__}: called again after {reason}")
        return work()

    def _with_less_is_possible(self, phase: Phase) -> bool:
        plan = phase.plan
        return not phase.casts and (plan.staging_bytes > plan.slot_bytes or any(p.tier.value == "device" for p in plan.placements))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
