"""Methods of a managed object that would move its weights behind the plan's back: replaced on the instance by a clear
error, and put back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from overflowml_core.errors import Managed

MODULE_MOVES = ("to", "cuda", "cpu", "xpu", "half", "float", "double", "bfloat16", "to_empty", "type")
"""Methods of ``torch.nn.Module`` that move or cast all parameters."""


_SHOWN = (str, int, float, torch.dtype, torch.device)


def guard(target: object, methods: Iterable[str], what: str) -> Callable[[], None]:
    """Let these methods of one object raise :class:`Managed`.

    Args:
        target: the model or pipeline.
        methods: names; those that it lacks are left out.
        what: "model" or "pipeline", for the message.

    Returns:
        A function that takes the guards off again.
    """
    namespace: dict[str, Any] = vars(target)
    before: dict[str, tuple[bool, Any]] = {}
    for name in methods:
        if hasattr(type(target), name):
            before[name] = (name in namespace, namespace.get(name))
            # Into __dict__ itself: some hosts' __setattr__ takes every attribute for a component.
            namespace[name] = _refusal(what, name)

    def unguard() -> None:
        for name, (was_there, value) in before.items():
            if was_there:
                namespace[name] = value
            else:
                namespace.pop(name, None)

    return unguard


def guard_state(module: nn.Module, what: str, holds: Callable[[nn.Module, str], bool]) -> Callable[[], None]:
    """Let ``load_state_dict`` of a module raise :class:`Managed` where it would write into weights of the plan; what was added since, such
    as an adapter, is loaded as ever.

    Args:
        module: the model, or a component of a pipeline.
        what: "model" or "pipeline", for the message.
        holds: whether a parameter, given by its module and attribute, is the plan's.

    Returns:
        A function that takes the guard off again.
    """
    namespace = vars(module)
    before = (("load_state_dict" in namespace), namespace.get("load_state_dict"))

    def load_state_dict(state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        inner = dict(module.named_modules())
        places = ((inner.get(path), attribute) for path, _, attribute in (name.rpartition(".") for name in state_dict))
        if any(owner is not None and holds(owner, attribute) for owner, attribute in places):
            # What is streamed from a file is read from there: values written into it would be lost without a word.
            raise Managed(what, f"{what}.load_state_dict(...)")
        return type(module).load_state_dict(module, state_dict, *args, **kwargs)

    namespace["load_state_dict"] = load_state_dict

    def unguard() -> None:
        if before[0]:
            namespace["load_state_dict"] = before[1]
        else:
            namespace.pop("load_state_dict", None)

    return unguard


def guard_parts(module: nn.Module, name: str) -> Callable[[], None]:
    """Let every move or cast of a part of a module (``model.model.half()``), and every copy or pickle of it, raise :class:`Managed`.

    Args:
        module: whose parts, itself included.
        name: what the module is called, for the message.

    Returns:
        A function that takes the guards off again.
    """
    guarded: list[dict[str, Any]] = []
    for path, part in module.named_modules():
        namespace = vars(part)
        if "_apply" not in namespace:
            # What to, half, cuda and the like all come down to.
            namespace["_apply"] = _refuse_moves(
                weakref.ref(part), f"a move or cast of {name}.{path}" if path else f"a move or cast of {name}"
            )
            guarded.append(namespace)
    # Asked by copy.deepcopy and by pickle, of the instance.
    vars(module)["__reduce_ex__"] = _refuse_all(f"a copy or pickle of {name}")

    def unguard() -> None:
        for namespace in guarded:
            namespace.pop("_apply", None)
        vars(module).pop("__reduce_ex__", None)

    return unguard


def is_guarded(module: nn.Module) -> bool:
    """Whether a module is a part of a managed one, or holds such a part."""
    return any("_apply" in vars(part) for part in module.modules())


def _refuse_moves(reference: weakref.ref[nn.Module], call: str) -> Callable[..., nn.Module]:
    """Refuses whatever would change where the part's tensors are or what they are; whoever only makes sure, as PEFT does, may go on."""

    def apply(change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        part = reference()
        if part is None:
            raise Managed("model", call)
        for dtype, device in {(t.dtype, t.device) for t in (*part.parameters(), *part.buffers()) if not t.is_meta}:
            changed = change(torch.empty(0, dtype=dtype, device=device))
            if (changed.dtype, changed.device) != (dtype, device):
                raise Managed("model", call)
        return part

    return apply


def _refuse_all(call: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise Managed("model", call)

    return refuse


def _refusal(what: str, name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        # A state dict or a tensor would fill the message.
        shown = ", ".join([repr(a) if isinstance(a, _SHOWN) else "..." for a in args] + [f"{k}=..." for k in kwargs])
        raise Managed(what, f"{what}.{name}({shown})")

    return refuse
