"""Hook pairs that stay outside of what ``torch.compile`` makes of a block: a graph holds the block's own computing, no waiting for weights.

A block that is compiled has its hooks around the compiled call; others have torch's own. ``block.compile(...)`` goes from one to the other,
as diffusers' ``compile_repeated_blocks`` calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

_log = logging.getLogger("overflowml")


class Before(Protocol):
    """Called with the module, and the arguments and keywords that it is called with."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...


class After(Protocol):
    """Called with the module, its arguments and its output, however the call ended; None for the output where it failed or is compiled."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None: ...


def keep_out_of_graphs(hook: Callable[..., Any]) -> None:
    """Have a hook called between graphs where somebody compiles what it hooks from outside; torch reads this mark of its own
    ``torch.compiler.disable``."""
    vars(hook)["_torchdynamo_disable"] = True


class Uncompiled:
    """A block that is streamed in parts, until it is removed: it runs as it is, for no graph holds the waiting for each of its parts. What
    it was compiled into, before or meanwhile, is kept for afterwards."""

    def __init__(self, module: nn.Module) -> None:
        """Have a block run uncompiled from now on."""
        self._module = module
        self._compiled: Callable[..., Any] | None = vars(module).pop("_compiled_call_impl", None)
        vars(module)["compile"] = self._compile
        if self._compiled is not None:
            self._tell()

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        self._compiled = torch.compile(self._module._call_impl, *args, **kwargs)
        self._tell()

    def _tell(self) -> None:
        _log.info("%s is streamed in parts and runs uncompiled; a larger budget holds it whole", type(self._module).__name__)

    def remove(self) -> None:
        """Let it be compiled again. A second call does nothing."""
        vars(self._module).pop("compile", None)
        if self._compiled is not None:
            vars(self._module)["_compiled_call_impl"] = self._compiled
            self._compiled = None


def _take_off(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any], marks: dict[int, bool]) -> None:
    for key in [key for key, found in hooks.items() if found is hook]:
        hooks.pop(key, None)
        marks.pop(key, None)


class HookPair:
    """Two hooks of one block, until they are removed."""

    def __init__(self, module: nn.Module, before: Before, after: After) -> None:
        """Hook nothing yet, so that whoever is to remove the pair holds it before there is something to remove."""
        self._module = module
        self._before, self._after = before, after
        for hook in (before, after):
            keep_out_of_graphs(hook)
        self._compiled: Callable[..., Any] | None = None

    def put_on(self) -> HookPair:
        """Hook the block, compiled or not."""
        self._compiled = vars(self._module).get("_compiled_call_impl")
        vars(self._module)["compile"] = self._compile
        if self._compiled is None:
            self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            self._module.register_forward_hook(self._after, always_call=True)
        else:
            vars(self._module)["_compiled_call_impl"] = self._around(self._compiled)
        return self

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        self._take_off()
        self._compiled = torch.compile(self._module._call_impl, *args, **kwargs)
        vars(self._module)["_compiled_call_impl"] = self._around(self._compiled)

    def _around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        module, before, after = self._module, self._before, self._after

        def call(*args: Any, **kwargs: Any) -> Any:
            before(module, args, kwargs)
            try:
                return compiled(*args, **kwargs)
            finally:
                after(module, args, None)

        return call

    def _take_off(self) -> None:
        # By what is called and not by torch's handles: an interrupt inside torch's register_... leaves a hook whose handle nobody got.
        _take_off(self._module._forward_pre_hooks, self._before, self._module._forward_pre_hooks_with_kwargs)
        _take_off(self._module._forward_hooks, self._after, self._module._forward_hooks_always_called)

    def remove(self) -> None:
        """Take the hooks off; the block stays compiled. A second call does nothing."""
        self._take_off()
        vars(self._module).pop("compile", None)
        if self._compiled is not None:
            vars(self._module)["_compiled_call_impl"] = self._compiled
            self._compiled = None
