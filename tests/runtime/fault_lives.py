"""Bare modules whose calls are made to fail: two phases, so that there is a switch, with live weights or unread ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from overflowml_core.facts import Limits
from overflowml_core.loading import Loading
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import job, on_meta, rows, save, slots_budget, snapshot, stack

STAGES = ("load", "first pass", "later pass", "switch", "remove")


class BareSubject:
    """Two stacks. ``tier`` is where streamed weights wait; those that wait on disk are unread before the load."""

    def __init__(self, device: Device, folder: Path, tier: str, blocks: int = 4, resident: int = 1) -> None:
        self.stages = STAGES
        self.tier, self.device, self.folder = tier, device, folder
        self.modules: dict[str, nn.Module] = {name: stack(blocks, 16, seed=i, ends=True) for i, name in enumerate(("one", "two"))}
        self.budget_bytes = slots_budget(self.modules["one"], 2, resident)
        self.paths = {name: save(dict(m.named_parameters()), folder / f"{name}.safetensors") for name, m in self.modules.items()}
        self.expected: dict[str, torch.Tensor] = {}
        self.expect()

    def expect(self) -> None:
        """Take down what the modules give where nobody manages them."""
        one, two = (self.call(copy.deepcopy(module).to(self.device.torch_device)) for module in self.modules.values())
        self.expected = {"first pass": one, "later pass": one, "switch": two}

    def call(self, module: nn.Module) -> torch.Tensor:
        """Inputs on the device, the result on the CPU."""
        with torch.no_grad():
            result: torch.Tensor = module(rows().to(self.device.torch_device))
            return result.cpu()

    def begin(self) -> BareLife:
        """See :class:`tests.runtime.fault_points.Subject`."""
        return BareLife(self)


class BareLife:
    """See :class:`tests.runtime.fault_points.Life`."""

    def __init__(self, subject: BareSubject) -> None:
        self._subject = subject
        loading: Loading | None = None
        if subject.tier == "disk":
            loading, modules = Loading(Limits()), {}
            for name, module in subject.modules.items():
                modules[name], own = on_meta(module, subject.paths[name])
                loading.origins |= own.origins
        else:
            modules = copy.deepcopy(subject.modules)
        self._modules = modules
        self._task = job(modules, subject.device, budget_bytes=subject.budget_bytes, tier=subject.tier, loading=loading)
        self._before = {} if loading else self._look()
        self._engine: Engine | None = None

    def _look(self) -> dict[str, object]:
        return {name: (snapshot(module), _attributes(module)) for name, module in self._modules.items()}

    @property
    def steps(self) -> Mapping[str, Callable[[], torch.Tensor | None]]:
        """By stage what is done in it."""
        one, two = self._modules.values()
        return {
            "load": self._load,
            "first pass": lambda: self._subject.call(one),
            "later pass": lambda: self._subject.call(one),
            "switch": lambda: self._subject.call(two),
            "remove": self._remove,
        }

    def _load(self) -> None:
        self._engine = self._task.attach(self._subject.folder / "store")

    def _remove(self) -> None:
        if self._engine is not None:
            self._engine.detach()

    def recover(self, stage: str) -> None:
        """Nothing has to be taken back."""

    def remainder(self) -> str:
        """Whether the weights are as they were."""
        if self._before:
            return "" if self._look() == self._before else "the modules are not as they were"
        for name, module in self._modules.items():
            wanted = self._subject.modules[name]
            for path, parameter in module.named_parameters():
                if not torch.equal(parameter, wanted.get_parameter(path)):
                    return f"{name}.{path} has another value"
        return ""


def _attributes(module: nn.Module) -> list[tuple[set[str], list[object]]]:
    parts = list(module.modules())
    return [(set(vars(part)), [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]) for part in parts]
