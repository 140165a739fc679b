"""What a call of a component could change, taken down before it, so that a call that failed can be made again. Knows no plan."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.phase import buffers_of

_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, torch.dtype, torch.device, torch.layout, type)
_PLAIN = frozenset(_ATOMS) - {enum.Enum, type}
_MOST_VALUES = 10_000
_HEAP_TYPE = 1 << 9
"""Flag of classes that Python code made (Include/object.h): their instances keep nothing outside their attributes."""


class CallState:
    """The arguments and the state that one call of a module finds.

    Note [again]. A call may be made again where everything that it was given and that the module keeps is as it was. Lists, dicts and
    objects made by Python code are put back by what they referred to: a cache that joins its keys into new tensors refers to the old
    ones again. Tensors are not copied: one that was written to in place (a static cache, a state, an input) forbids it, and its version
    counter says so. Random generators are set back. Attributes of inner modules are not watched.
    """

    def __init__(self, module: nn.Module, values: Iterable[object], buffers: Iterable[torch.Tensor]) -> None:
        """Take down what there is.

        Args:
            module: what is called.
            values: its arguments.
            buffers: what its buffers are on the device.
        """
        self.obstacle = ""
        """Why a call cannot be made again, as far as it is known before it; empty where it can."""
        self._module = module
        self._own = dict(vars(module))
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._restores: list[Callable[[], object]] = []
        self._buffers: set[int] = set()
        self._seen: set[int] = set()
        self._kept: list[object] = []
        for buffer in buffers:
            self._buffers.add(id(buffer))
            self._take_tensor(buffer)
        self._take_generators(buffers)
        self._take(list(values))

    def _take(self, stack: list[Any]) -> None:
        while stack and not self.obstacle:
            value = stack.pop()
            if type(value) in _PLAIN or id(value) in self._seen or isinstance(value, _ATOMS):
                continue
            self._seen.add(id(value))
            self._kept.append(value)  # or another one could come to have its id
            if len(self._kept) > _MOST_VALUES:
                self.obstacle = f"it was called with more than {_MOST_VALUES} values"
            elif isinstance(value, torch.Tensor):
                self._take_tensor(value)
            elif isinstance(value, torch.Generator):
                self._take_generator(value)
            else:
                stack += self._contents(value)

    def _contents(self, value: Any) -> list[Any]:
        """What a container or an object refers to; how to put that back is kept."""
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        inside: list[Any] = []
        if isinstance(value, list):
            elements = list(value)
            self._restores.append(lambda: value.__setitem__(slice(None), elements))
            inside += elements
        elif isinstance(value, dict):
            entries = dict(value)
            self._restores.append(lambda: (dict.clear(value), dict.update(value, entries)))
            inside += [*entries, *entries.values()]
        elif not _is_transparent(type(value)):  # type: ignore[arg-type]  # mypy on a metaclass
            self.obstacle = f"it was called with a {type(value).__name__}, which may have changed"
            return []
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            before = dict(attributes)
            self._restores.append(lambda: (attributes.clear(), attributes.update(before)))
            inside += before.values()
        return inside

    def _take_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.is_inference():
            self.obstacle = "it was called in inference mode, where nothing tells whether a tensor was written to; use torch.no_grad()"
        else:
            self._tensors.append((tensor, tensor._version))

    def _take_generator(self, generator: torch.Generator) -> None:
        state = generator.get_state()
        self._restores.append(lambda: generator.set_state(state))

    def _take_generators(self, buffers: Iterable[torch.Tensor]) -> None:
        self._take_generator(torch.default_generator)
        for kind in ("cuda", "xpu"):
            module = getattr(torch, kind, None)
            if module is not None and module.is_initialized():
                for generator in module.default_generators:
                    self._take_generator(generator)

    def put_back(self) -> str:
        """Have everything as it was before the call.

        Returns:
            Why that cannot be; empty where it is done.
        """
        obstacle = self.obstacle or self._written() or _watchers(self._module)
        if not obstacle:
            for restore in self._restores:
                restore()
            own = vars(self._module)
            for name in set(own) - set(self._own):
                del own[name]
            own.update(self._own)
        return obstacle

    def _written(self) -> str:
        for tensor, version in self._tensors:
            if tensor._version != version:
                what = "a buffer" if id(tensor) in self._buffers else "an argument or a cache"
                return f"{what} of shape {tuple(tensor.shape)} was written to in place"
        if self._buffers and any(id(b) not in self._buffers for _, b in buffers_of([self._module])):
            return "a buffer was replaced"
        return ""


@functools.cache
def _is_transparent(kind: type) -> bool:
    """Whether all that an object keeps are its attributes."""
    if issubclass(kind, nn.Module):
        return False
    return all(base is object or (base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__")) for base in kind.__mro__)


def _watchers(module: nn.Module) -> str:
    """Hooks and wrappers of others inside a module, which may count calls."""
    for path, inner in module.named_modules():
        hooks = (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values())
        if any(not _is_ours(hook) for hook in hooks) or (inner is not module and not _is_ours(vars(inner).get("forward", _is_ours))):
            return f"{path or type(module).__name__} has a hook or a wrapper of its forward that is not ours and may keep count"
    return ""


def _is_ours(function: object) -> bool:
    return str(getattr(function, "__module__", "")).startswith(("overflowml_core.", "overflowml_"))
