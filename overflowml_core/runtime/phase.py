"""One phase of a plan on the device: its residents, buffers and streamer come in together and leave together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.recast import Cast
from overflowml_core.runtime.streamer import Streamer
from overflowml_core.runtime.structure import Owner


class Phase:
    """What the runtime holds for one phase of the plan.

    Attributes:
        plan: what was decided.
        streamer: of its streamed blocks; another one after a cast.
        residents: slabs that are on the device while the phase runs and have a home outside of it.
        modules: the phase's components.
        casts: by dtype, the homes of the phase in it.
    """

    def __init__(
        self, device: Device, feeder: Feeder, plan: PhasePlan, streamer: Streamer, residents: Iterable[Home], modules: Sequence[nn.Module]
    ) -> None:
        self.plan = plan
        self.streamer = streamer
        self.residents = list(residents)
        self.modules = tuple(modules)
        self.casts: dict[torch.dtype, Cast] = {}
        self._device = device
        self._feeder = feeder
        self._arenas: list[torch.Tensor] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs of a buffer on the device and the one that it stands for."""

    def enter(self) -> None:
        """Bring everything onto the device. Whatever fails, nothing of the phase stays there.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            ReadFault: a file is gone or shorter than it was.
        """
        try:
            for home in self.residents:
                self._bring(home)
            if not self._device.on_host:
                self._bring_buffers()
            self.streamer.open()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Free what the phase takes of the device. Weights are at home afterwards; nothing is copied back, for they do not change."""
        self._device.synchronize()
        self.streamer.close()
        for home in self.residents:
            home.slab.install(home.parameters)
        if not self._device.on_host:
            self._take_buffers_home()
        self._arenas.clear()
        self._device.trim()

    def _bring(self, home: Home) -> None:
        arena = self._device.empty(home.slab.nbytes)
        self._arenas.append(arena)
        start, end = self._device.new_event(), self._device.new_event()
        self._device.record(start)
        self._feeder.feed(home, arena, start, end)
        self._device.wait(end)
        home.slab.install(home.slab.parameters(arena))

    def _bring_buffers(self) -> None:
        moved: dict[int, torch.Tensor] = {}
        for owner, buffer in buffers_of(self.modules):
            if id(buffer) not in moved:  # one that several modules share stays one
                moved[id(buffer)] = buffer.to(self._device.torch_device)
                self._buffers.append((moved[id(buffer)], buffer))
            owner.module._buffers[owner.attribute] = moved[id(buffer)]

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
