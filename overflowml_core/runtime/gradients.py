"""Managed models compute without gradients: their weights change place under autograd, which would keep them all alive or go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import Unsupported


def without_gradient(module: nn.Module) -> Callable[[], None]:
    """Let a module's forward run under ``torch.no_grad``, as most callers intend and some forget.

    Done on the instance's ``forward``, not by a pair of hooks: a hook that follows does not run on an interrupt, and would leave
    gradients off for the whole thread.

    Returns:
        A function that takes it back.
    """
    namespace = vars(module)
    before = namespace.get("forward")
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return original(*args, **kwargs)

    namespace["forward"] = forward

    def undo() -> None:
        # Somebody who wrapped forward after us keeps our wrapper inside; it does no harm there.
        if namespace.get("forward") is forward:
            if before is None:
                del namespace["forward"]
            else:
                namespace["forward"] = before

    return undo


def refuse_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Look at what a module is called with.

    Raises:
        Unsupported: a tensor asks for a gradient, and gradients are on.
    """
    if torch.is_grad_enabled():
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise Unsupported(
                    f"{type(module).__name__}: gradients are not supported while overflowml manages the model "
                    "(its weights change place under autograd); wrap the call in torch.no_grad(), "
                    "or give the model back with overflowml.release(model)"
                )
