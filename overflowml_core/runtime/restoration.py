"""The way back: units with plain weights again, and modules as they were before a load that was broken off. Knows no phases, no plans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.encode import EncodedWeight
from overflowml_core.runtime.parts import parts_of, refit
from overflowml_core.runtime.rearrange import Held
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.source import stored_as_is


def give_back(held: Held, original: Callable[[Entry], torch.Tensor]) -> None:
    """Let modules hold the weights of a unit as they were. May be done again where it was broken off.

    Args:
        held: the unit.
        original: reads a weight that is in a format now.

    Raises:
        ReadFault: a file is gone or shorter than it was.
    """
    parameters = []
    for (weight, entries), parameter, device in zip(held.slab.by_weight(), held.home.parameters, held.devices, strict=True):
        if isinstance(weight, EncodedWeight):
            parameter = weight.given_back(original)
        # Only what is mapped from the model's own file may stay as it is; pinned memory and the packed store go away.
        elif held.home.host is not None or not stored_as_is(held.slab):
            of_arena = None if held.arena is None else {entry.path: entry.view(held.arena) for entry in entries}
            values = of_arena or {part.path: part.tensor for part in parts_of(parameter)}
            parameter = parameter if weight.parameter.is_meta else weight.parameter
            _refit_apart(parameter, values, device)
        parameters.append(parameter)
    held.slab.install(tuple(parameters))


def let_go(slab: Slab, devices: Sequence[torch.device]) -> None:
    """Have a unit's own weights in plain memory where the way to its home was broken off: some of them may show the home already.

    Args:
        slab: the unit.
        devices: where each weight was.
    """
    for weight, device in zip(slab.unit.weights, devices, strict=True):
        if not weight.parameter.is_meta and not isinstance(weight, EncodedWeight):
            _refit_apart(weight.parameter, {part.path: part.tensor for part in parts_of(weight.parameter)}, device)


def _refit_apart(parameter: nn.Parameter, values: dict[Any, torch.Tensor], device: torch.device) -> None:
    back = torch.device("cpu") if device.type == "meta" else device
    refit(parameter, {path: tensor.detach().to(back, copy=True) for path, tensor in values.items()})


class Namespaces:
    """What modules hold beside the data of their tensors, as it was: attributes of their own, hooks, which parameter is where.

    Only for a load that fails: nobody but the load changed anything meanwhile.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Note how these modules are, with all that are inside of them."""
        inner = {id(part): part for module in modules for part in module.modules()}
        self._kept = [
            (vars(part), dict(vars(part)), {name: value.copy() for name, value in vars(part).items() if type(value) in (dict, OrderedDict)})
            for part in inner.values()
        ]

    def put_back(self) -> None:
        """Have them as they were. May be done again."""
        for namespace, attributes, contents in self._kept:
            for name in namespace.keys() - attributes.keys():
                namespace.pop(name, None)
            namespace.update(attributes)
            for name, content in contents.items():
                namespace[name].clear()
                namespace[name].update(content)
