"""One phase of a plan on the device: its residents, buffers and streamer come in together and leave together.

Note [arrivals]. Where copies run beside what computes, nobody waits for all residents: a resident block is installed when it is
called for the first time, behind its own copy. Until then it shows its weights at home, so that who reads them past the block's
call meets the host, not bytes that are not there yet.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.compiling import HookPair
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.conductor import Conductor
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.guests import Guests
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.recast import Cast
from overflowml_core.runtime.streamer import Streamer
from overflowml_core.runtime.structure import Owner


@dataclass(slots=True)
class _Arrival:
    """A resident block on its way: what is installed behind which event, and the hooks that do it."""

    home: Home
    parameters: tuple[nn.Parameter, ...]
    end: Any
    hooks: HookPair


def _go_on(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """Nothing is to be done when a resident block was called."""


class Stay(enum.Enum):
    """Where a phase is."""

    AWAY = "away"
    """Nothing of it is on the device."""
    PARTLY = "partly"
    """Coming or leaving; where that was broken off it leaves before anything else comes."""
    THERE = "there"
    """All of it is on the device, or on its way there."""


class Phase:
    """What the runtime holds for one phase of the plan.

    Attributes:
        plan: what was decided.
        streamer: of its streamed blocks; another one after a cast.
        residents: slabs that are on the device while the phase runs and have a home outside of it.
        modules: the phase's components.
        casts: by dtype, the homes of the phase in it.
        guests: parameters that came into its modules after the plan was attached.
        stay: where it is.
        is_present: it is there and nobody waits for its place, so that calls need not ask.
        conductor: of its routed experts, where they are apart from its blocks.
        block_hooks: what takes the hooks off its streamed blocks.
    """

    def __init__(
        self, device: Device, feeder: Feeder, plan: PhasePlan, streamer: Streamer, residents: Iterable[Home], modules: Sequence[nn.Module]
    ) -> None:
        self.plan = plan
        self.streamer = streamer
        self.residents = list(residents)
        self.modules = tuple(modules)
        self.casts: dict[torch.dtype, Cast] = {}
        self.guests = Guests(device)
        self.stay = Stay.AWAY
        self.is_present = False
        self.conductor: Conductor | None = None
        self.block_hooks: list[HookPair] = []
        self._device = device
        self._feeder = feeder
        self._arenas: list[torch.Tensor] = []
        self._arriving: dict[int, _Arrival] = {}
        """By id of its module, each resident block that was not called yet."""
        self._lock = threading.RLock()
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs of a buffer on the device and the one that it stands for."""

    def enter(self) -> None:
        """Bring everything onto the device. Whatever fails, nothing of the phase stays there.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            ReadFault: a file is gone or shorter than it was.
        """
        self.stay = Stay.PARTLY
        try:
            if not self._device.on_host:
                self._bring_buffers()  # first: their copies wait for no others
            for home in self.residents:
                self._bring(home)
            self.guests.bring()
            self.streamer.open()
            if self.conductor is not None:
                self.conductor.open()
            self.stay = Stay.THERE
            self.is_present = True
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Free what the phase takes of the device. Weights are at home afterwards; nothing is copied back, for they do not change.

        A second call goes on where an error broke off, and so does :meth:`enter`.

        Raises:
            RuntimeError: guests or buffers could not be copied to RAM; they are still on the device, all else is free.
        """
        self.is_present = False
        self.stay = Stay.PARTLY
        with self._lock:
            for arrival in self._arriving.values():
                arrival.hooks.remove()
            self._arriving.clear()
        self._device.synchronize()
        self.streamer.close()
        if self.conductor is not None:
            self.conductor.close()
        for home in self.residents:
            home.slab.install(home.parameters)
        self._arenas.clear()
        self.guests.take_home()
        if not self._device.on_host:
            self._take_buffers_home()
        self._device.trim()
        self.stay = Stay.AWAY

    def _bring(self, home: Home) -> None:
        arena = self._device.empty(home.slab.nbytes)
        self._arenas.append(arena)
        start, end = self._device.new_event(), self._device.new_event()
        self._device.record(start)
        self._feeder.feed(home, arena, (start,), end)
        parameters, module = home.slab.parameters(arena), home.slab.unit.module
        if module is not None and self._device.overlaps:
            # The phase's own method and no closure: in a cycle of references it would keep the arena past the phase.
            arrival = self._arriving[id(module)] = _Arrival(home, parameters, end, HookPair(module, self._arrive, _go_on))
            arrival.hooks.put_on()
        else:
            self._device.wait(end)
            home.slab.install(parameters)

    def _arrive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install a resident block when it is called, behind its copy."""
        with self._lock:
            arrival = self._arriving.get(id(module))
            if arrival is not None:
                self._device.wait(arrival.end)
                arrival.home.slab.install(arrival.parameters)
                arrival.hooks.remove()
                del self._arriving[id(module)]

    def _bring_buffers(self) -> None:
        moved: dict[int, torch.Tensor] = {}
        for there, original in self._buffers:  # what an error or an interrupt left there
            moved[id(there)] = moved[id(original)] = there
        for owner, buffer in buffers_of(self.modules):
            if id(buffer) not in moved:  # one that several modules share stays one
                moved[id(buffer)] = buffer.to(self._device.torch_device)
                self._buffers.append((moved[id(buffer)], buffer))
            owner.module._buffers[owner.attribute] = moved[id(buffer)]

    def moved_buffers(self) -> list[torch.Tensor]:
        """The buffers as they are on the device; none where the phase is not there."""
        return [moved for moved, _ in self._buffers]

    def _take_buffers_home(self) -> None:
        originals = {id(moved): original for moved, original in self._buffers}
        for moved, original in self._buffers:
            if moved is not original:
                original.copy_(moved)  # a model may write to its buffers
        for owner, present in buffers_of(self.modules):
            original = originals.get(id(present))
            if original is None and present.device.type == self._device.torch_device.type:
                original = present.to("cpu")  # the model put another one in its place
            if original is not None:
                owner.module._buffers[owner.attribute] = original
        self._buffers.clear()


def buffers_of(modules: Iterable[nn.Module]) -> list[tuple[Owner, torch.Tensor]]:
    """Every buffer with the place that holds it."""
    return [
        (Owner(inner, attribute), buffer)
        for module in modules
        for inner in module.modules()
        for attribute, buffer in inner._buffers.items()
        if buffer is not None
    ]
