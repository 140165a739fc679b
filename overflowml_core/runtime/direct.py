"""A plan under which everything fits: weights are brought in once and stay; nothing is hooked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from overflowml_core.facts import Network
from overflowml_core.loading import Loading
from overflowml_core.plan import Estimate, Plan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.events import Events
from overflowml_core.runtime.homes import FileMaps
from overflowml_core.runtime.parts import is_plain, parameter_over
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Entry, lay_out
from overflowml_core.runtime.source import fill, is_stored_as_is
from overflowml_core.runtime.structure import Weight, dissect


class Direct:
    """The attachment of a direct plan. See :class:`overflowml_core.protocols.Attachment`."""

    def __init__(self, plan: Plan, network: Network, device: Device) -> None:
        self.plan = plan
        self.network = network
        self.device = device
        self.events = Events()
        self._undo: list[Callable[[], None]] = []
        self._ending = threading.RLock()
        self._is_over = False

    def attach(self, modules: Mapping[str, nn.Module], loading: Loading | None) -> Direct:
        """Bring in what the host left unread and move the modules to the device.

        Raises:
            ReadFault: a file is gone or shorter than it was.
            torch.OutOfMemoryError: the device has less room than the machine reported.
        """
        self.device.reset_peak()
        with torch.inference_mode(False), torch.no_grad(), FileReader() as reader, contextlib.ExitStack() as back:
            maps = FileMaps()
            # One module after the other, so that RAM never holds more than one of those that are cast.
            for module in modules.values():
                _bring_in(module, loading, partial(_brought, reader, maps, self.device.torch_device))
                if not self.device.on_host:
                    back.callback(_return, *_places(module))
                    module.to(self.device.torch_device)
            back.pop_all()
        return self

    def summary(self) -> str:
        """The plan in words, for a terminal."""
        return self.plan.summary()

    def report(self) -> Estimate:
        """What was measured: the peak of the device's allocator. On the CPU the weights are the host's own, and so is their memory."""
        measured = self.device.peak_bytes()
        return Estimate(device_peak_bytes=measured if not self.device.on_host else self.plan.estimate.device_peak_bytes)

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have something of a host's undone when the plan is detached; the latest first."""
        self._undo.append(undo)

    def detach(self) -> bool:
        """Undo what hosts registered, in the middle of a call, too. The weights stay where they are.

        Returns:
            Whether this call did it, and not one before.
        """
        with self._ending:
            was_over = self._is_over
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
            self._is_over = True
            return not was_over


_Parameters = list[tuple[nn.Parameter, torch.device]]
_Buffers = list[tuple[nn.Module, dict[str, torch.Tensor | None]]]


def _places(module: nn.Module) -> tuple[_Parameters, _Buffers]:
    parameters = [(parameter, parameter.device) for parameter in module.parameters()]
    return parameters, [(inner, dict(inner._buffers)) for inner in module.modules()]


def _return(parameters: _Parameters, buffers: _Buffers) -> None:
    """Take a module back from a device that has too little room."""
    for parameter, device in parameters:
        if is_plain(parameter):
            parameter.data = parameter.data.to(device)
        elif parameter.device != device:
            # What is made of other tensors says itself where it is, so that its data alone cannot go back.
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad))
    for inner, originals in buffers:
        inner._buffers.update(originals)


def _bring_in(module: nn.Module, loading: Loading | None, bring: Callable[[Entry], torch.Tensor]) -> None:
    for unit in dissect(module).units:
        slab = lay_out(unit, loading)
        slab.install(tuple(_whole(weight, entries, bring) for weight, entries in slab.by_weight()))


def _whole(weight: Weight, entries: Sequence[Entry], bring: Callable[[Entry], torch.Tensor]) -> nn.Parameter:
    if not weight.parameter.is_meta:
        return weight.parameter
    return parameter_over(weight.parameter, {entry.path: bring(entry) for entry in entries})


def _brought(reader: FileReader, maps: FileMaps, device: torch.device, entry: Entry) -> torch.Tensor:
    if is_stored_as_is(entry):
        return maps.view(entry)
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    fill([entry], data, reader, entry.offset_bytes)
    # At once: unlike what is mapped it takes RAM, which need not hold all of the model.
    return entry.view(data, entry.offset_bytes).to(device)
