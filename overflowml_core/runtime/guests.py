"""Parameters that arrive after a plan was attached: adapters, attention processors, resized embeddings.

They are on the device while their phase is there, and in RAM else. Knows no host: whoever puts a module or a parameter into a watched
tree is seen by torch's own registration hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from overflowml_core.errors import DoesNotFit, NearMiss
from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.device import Device
from overflowml_core.units import ceil_size

_RESERVE_SHARE = 8
"""Guests may take an eighth of what is kept for activations: about what adapters of usual ranks take, and what predictions are off by."""


class Arrivals:
    """Notices what is registered in module trees after they were built.

    torch's registration hooks see every module of the process, so what they do is one look into a dictionary. Deletions are not seen;
    what is gone needs no care.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Watch these trees until :meth:`close`.

        Args:
            modules: their roots.
        """
        self.changed = False
        self.replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        """Parameters that were put where a watched module may have had another one: module, attribute, the new one."""
        self._known: dict[int, weakref.ref[nn.Module]] = {}
        self._shapes: dict[int, list[torch.Size]] = {}
        """By id of a watched module, those of its parameters when it came."""
        self._listeners: list[Callable[[nn.Module], None]] = []
        for module in modules:
            self._watch(module)
        me = weakref.ref(self)

        def module_came(module: nn.Module, name: str, child: nn.Module | None) -> None:
            watcher = me()
            if watcher is None or child is None or not watcher.knows(module):
                return
            # Routers put what they classify with where it is already on every call; hosts do so when they have resized it.
            if module._modules.get(name) is not child or watcher._is_reshaped(child):
                watcher._welcome(child)

        def parameter_came(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            watcher = me()
            if watcher is not None and watcher.knows(module):
                watcher._note(module, name, parameter)

        handles = [
            register_module_module_registration_hook(module_came),  # type: ignore[no-untyped-call]
            register_module_parameter_registration_hook(parameter_came),  # type: ignore[no-untyped-call]
        ]
        # A model may be dropped without being given back; its hooks must not stay in torch then.
        self._end = weakref.finalize(self, _remove, handles)

    def listen(self, listener: Callable[[nn.Module], None]) -> None:
        """Have each module that arrives, and each one inside it, told to this function."""
        self._listeners.append(listener)

    def knows(self, module: nn.Module) -> bool:
        """Whether a module is in one of the trees."""
        known = self._known.get(id(module))
        return known is not None and known() is module

    def settled(self) -> None:
        """Forget what has come so far."""
        self.changed = False
        self.replaced.clear()

    def close(self) -> None:
        """Stop watching. A second call does nothing."""
        self._end()

    def _watch(self, module: nn.Module) -> list[nn.Module]:
        fresh = [inner for inner in module.modules() if not self.knows(inner)]
        self._known.update((id(inner), weakref.ref(inner)) for inner in fresh)
        self._shapes.update((id(inner), _shapes(inner)) for inner in module.modules())
        return fresh

    def _is_reshaped(self, child: nn.Module) -> bool:
        return any(self._shapes.get(id(inner)) != _shapes(inner) for inner in child.modules())

    def _welcome(self, child: nn.Module) -> None:
        self.changed = True
        for inner in self._watch(child):
            for listener in self._listeners:
                listener(inner)

    def _note(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and module._parameters.get(name) is parameter:
            return  # put where it is already, as PEFT does when it takes an adapter out
        self.changed = True
        if parameter is not None:
            self.replaced.append((module, name, parameter))


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module._parameters.values() if parameter is not None]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


class Guests:
    """The guests of one phase. They keep their identity: what moves is their data, and nothing of it is held twice."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._parameters: list[weakref.ref[nn.Parameter]] = []

    def admit(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take these for the guests from now on; their number is small and they are found anew at each change."""
        self._parameters = [weakref.ref(parameter) for parameter in parameters]

    def __iter__(self) -> Iterator[nn.Parameter]:
        for reference in self._parameters:
            parameter = reference()
            # Hosts build adapters without data first, and fill them before they are used.
            if parameter is not None and not parameter.is_meta:
                yield parameter

    @property
    def nbytes(self) -> int:
        """Bytes of their elements."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self)

    def bring(self) -> None:
        """Have them on the device.

        Raises:
            torch.OutOfMemoryError: it has no room.
        """
        move(self, self._device.torch_device)

    def take_home(self) -> None:
        """Have them in RAM, with what was written to them meanwhile."""
        if not self._device.on_host:
            move(self, torch.device("cpu"))

    def cast(self, dtype: torch.dtype) -> None:
        """Have those that float in another dtype, as a cast of the module that they are in would."""
        for parameter in self:
            if parameter.is_floating_point() and parameter.dtype is not dtype:
                parameter.data = parameter.data.to(dtype)

    def wanted_bytes(self, phase: PhasePlan) -> int:
        """Bytes that the phase's plan must leave for them, beyond the small part of what is kept for activations that they may take."""
        return max(self.nbytes - phase.activation_bytes // _RESERVE_SHARE, 0)

    def refuse(self, phase: PhasePlan, budget_bytes: int) -> NoReturn:
        """Say that a phase has no room for them, even with none of its blocks resident and staging for the largest of them.

        Raises:
            DoesNotFit: always.
        """
        taken = self.nbytes
        one_slot_bytes = max((place.stored_bytes for place in phase.placements), default=0)
        needed = phase.device_bytes - phase.resident_bytes - phase.staging_bytes + one_slot_bytes + self.wanted_bytes(phase)
        remedy = f"give overflow='{ceil_size(needed)}' or more, or take out what was added"
        miss = NearMiss(f"{phase.name} with what was added to it", needed, budget_bytes, remedy)
        raise DoesNotFit(
            f"{phase.name}: adapters and other parameters that were added to it take {taken} bytes, "
            f"with them it needs {needed}, and the budget is {budget_bytes}; {remedy}",
            (miss,),
        )


def move(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Have parameters on a device; they stay the objects that they are."""
    for parameter in parameters:
        if parameter.device.type != device.type:
            parameter.data = parameter.data.to(device)
