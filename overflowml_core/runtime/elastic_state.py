"""What a call of a component could change, taken down before it, so that a call that failed can be made again. Knows no plan."""

from __future__ import annotations

import enum
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.phase import buffers_of

_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, torch.dtype, torch.device, torch.layout, type)
_PLAIN = frozenset(_ATOMS) - {enum.Enum, type}
_MOST_VALUES = 10_000
_HEAP_TYPE = 1 << 9
"""Flag of classes that Python code made (Include/object.h): their instances keep nothing outside their attributes."""


GROWING: dict[type, Mapping[str, int]] = {}
"""Classes, each by itself without those derived from it, with attributes that grow by joining new tensors behind the present ones, and
the dimension along which they do; hosts enter theirs."""


class _Former:
    """A tensor as it was, which is not kept alive."""

    __slots__ = ("shape", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.shape = tuple(tensor.shape)
        self.version = 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True)
class _Contents:
    """What an object referred to: its elements, entries or attributes, by number or name."""

    owner: Any
    place: Any
    before: list[tuple[Any, Any]]

    def put_back(self, found: list[tuple[Any, Any]]) -> None:
        """Have it refer to these again, and to nothing else."""
        if isinstance(self.place, list):
            self.place[:] = [one for _, one in found]
            return
        if self.place is self.owner:
            kind: Any = OrderedDict if isinstance(self.place, OrderedDict) else dict  # classes of hosts forbid some of their own methods
            kind.clear(self.place)
            for name, one in found:
                kind.__setitem__(self.place, name, one)
            return
        names = {name for name, _ in self.before}
        for name in [name for name in self.place if name not in names]:
            del self.place[name]
        self.place.update(found)


class CallState:
    """The arguments and the state that one call of a module finds.

    Note [again]. A call may be made again where everything that it was given and that the module keeps is as it was. Lists, dicts and
    objects made by Python code are put back by what they referred to. Tensors are not copied: one that was written to in place (a static
    cache, a state, an input) forbids it, and its version counter says so. Random generators are set back. Attributes of inner modules are
    not watched.

    Note [caches]. Tensors are not kept alive either: a cache that joins its keys into new tensors would take twice its memory in every
    call. One that is gone is what its successor begins with, where a host says that such objects grow by joining (``GROWING``); else the
    call cannot be made again.
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
        self._own = {name: _former(value) for name, value in vars(module).items()}
        self._tensors: list[_Former] = []
        self._contents_before: list[_Contents] = []
        self._restores: list[Callable[[], object]] = []
        self._buffers: set[int] = set()
        self._seen: set[int] = set()
        self._kept: list[object] = []
        for buffer in buffers:
            self._buffers.add(id(buffer))
            self._take_tensor(buffer)
        self._take_generators(buffers)
        self._take(list(values))
        self._kept.clear()

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
            inside += value
            self._contents_before.append(_Contents(value, value, [(number, _former(one)) for number, one in enumerate(value)]))
        elif isinstance(value, dict):
            inside += [*value, *value.values()]
            self._contents_before.append(_Contents(value, value, [(name, _former(one)) for name, one in value.items()]))
        elif not _is_transparent(type(value)):  # type: ignore[arg-type]  # mypy on a metaclass
            self.obstacle = f"it was called with a {type(value).__name__}, which may have changed"
            return []
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            inside += attributes.values()
            self._contents_before.append(_Contents(value, attributes, [(name, _former(one)) for name, one in attributes.items()]))
        return inside

    def _take_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.is_inference():
            self.obstacle = "it was called in inference mode, where nothing tells whether a tensor was written to; use torch.no_grad()"
        else:
            self._tensors.append(_Former(tensor))

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
        if obstacle:
            return obstacle
        module = _Contents(self._module, vars(self._module), list(self._own.items()))
        changes: list[tuple[_Contents, list[tuple[Any, Any]]]] = []
        for contents in (module, *self._contents_before):
            found = [(name, _again(contents.owner, name, one)) for name, one in contents.before]
            for (_, one), (_, present) in zip(contents.before, found, strict=True):
                if isinstance(one, _Former) and present is None:
                    return f"a cache of shape {one.shape} gave way to another tensor, and nobody knows how to take that back"
            changes.append((contents, found))
        for restore in self._restores:
            restore()
        for contents, found in changes:
            contents.put_back(found)
        return ""

    def _written(self) -> str:
        for former in self._tensors:
            tensor = former.tensor()
            if tensor is not None and tensor._version != former.version:
                what = "a buffer" if id(tensor) in self._buffers else "an argument or a cache"
                return f"{what} of shape {former.shape} was written to in place"
        if self._buffers and any(id(b) not in self._buffers for _, b in buffers_of([self._module])):
            return "a buffer was replaced"
        return ""


def _former(value: Any) -> Any:
    return _Former(value) if isinstance(value, torch.Tensor) else value


def _again(owner: object, name: Any, one: Any) -> Any:
    """What stood in a place; None for a tensor that is gone and cannot be had again."""
    if not isinstance(one, _Former):
        return one
    tensor, along = one.tensor(), GROWING.get(type(owner), {}).get(name)
    if tensor is not None or along is None:
        return tensor
    present = getattr(owner, name, None)
    if not isinstance(present, torch.Tensor) or present.dim() != len(one.shape):
        return None
    wanted = list(present.shape)
    wanted[along] = one.shape[along]
    if tuple(wanted) != one.shape or present.shape[along] < one.shape[along]:
        return None
    return present.narrow(along, 0, one.shape[along])


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
