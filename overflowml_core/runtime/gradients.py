"""Managed models compute without gradients: their weights change place under autograd, which would keep them all alive or go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.runtime.turns import is_call

_WHY = "gradients are not supported while overflowml manages the model (its weights change place under autograd)"
_GIVE_BACK = "or give the model back with overflowml.release(model)"


def without_gradient(module: nn.Module, prepare: Callable[[], None]) -> Callable[[], None]:
    """Let a module's forward run under ``torch.no_grad``, as most callers intend and some forget, behind a preparation.

    Done on the instance's ``forward``, not by a pair of hooks: a hook that follows does not run on an interrupt, and would leave
    gradients off for the whole thread. And PEFT's models call ``forward`` itself, past all hooks.

    Args:
        module: whose forward.
        prepare: called before each run.

    Returns:
        A function that takes it back.
    """
    namespace = vars(module)
    before = namespace.get("forward")
    original = module.forward

    @is_call
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        refuse_training(module)
        prepare()
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


def refuse_training(module: nn.Module) -> None:
    """Look at what a module is called for. In evaluation mode it runs, with or without ``torch.no_grad`` around it.

    Raises:
        Unsupported: it is in training mode, and gradients are on: whoever calls it would miss them only in ``backward()``.
    """
    if module.training and torch.is_grad_enabled():
        raise Unsupported(
            f"{type(module).__name__}: called in training mode, and {_WHY}; for inference call model.eval(), "
            f"or wrap the call in torch.no_grad(); for training {_GIVE_BACK[3:]}"
        )


def refuse_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Look at what a module is called with.

    Raises:
        Unsupported: a tensor asks for a gradient, and gradients are on.
    """
    if torch.is_grad_enabled():
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise Unsupported(f"{type(module).__name__}: {_WHY}; wrap the call in torch.no_grad(), {_GIVE_BACK}")
