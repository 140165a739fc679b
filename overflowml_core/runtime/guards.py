"""Methods of a managed object that would move its weights behind the plan's back: replaced on the instance by a clear
error, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from overflowml_core.errors import Managed

MODULE_MOVES = ("to", "cuda", "cpu", "xpu", "half", "float", "double", "bfloat16", "to_empty", "type")
"""Methods of ``torch.nn.Module`` that move or cast all parameters."""


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


def _refusal(what: str, name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        shown = ", ".join([repr(a) if not hasattr(a, "shape") else "..." for a in args] + [f"{k}=..." for k in kwargs])
        raise Managed(what, f"{what}.{name}({shown})")

    return refuse
