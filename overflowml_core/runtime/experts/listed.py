"""Experts that are modules of their own: each is brought in when it is called, and shows its weights at home else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.compiling import HookPair
from overflowml_core.runtime.experts.bank import experts_in
from overflowml_core.runtime.experts.conductor import Conductor
from overflowml_core.runtime.experts.encoded import Matrix, Operand


def hook_experts(conductor: Conductor, place: int, block: nn.Module, ensure: Callable[[], None]) -> list[HookPair]:
    """Have the experts of a list brought in as they are called.

    Args:
        conductor: of the phase.
        place: of the bank in it.
        block: that holds the list; its call begins a pass.
        ensure: has the phase on the device.
    """
    bank = conductor.seats[place].home.bank
    block_pass = _Pass(conductor, place)
    pairs = [HookPair(block, block_pass.before, block_pass.after).put_on()]
    for expert, module in enumerate(experts_in(bank.module)):
        one = _Listed(block_pass, expert, ensure)
        pairs.append(HookPair(module, one.before, one.after).put_on())
    return pairs


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in the first tensor of a call, at least one."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
    return max(1, first.numel() // first.shape[-1]) if first is not None and first.dim() and first.shape[-1] else 1


def _parameter(tensor: Operand) -> nn.Parameter:
    shown = tensor.decoded() if isinstance(tensor, Matrix) else tensor
    return shown if isinstance(shown, nn.Parameter) else nn.Parameter(shown, requires_grad=False)


class _Pass:
    """The call of a block under way: how many tokens went into it."""

    def __init__(self, conductor: Conductor, place: int) -> None:
        self.conductor = conductor
        self.place = place
        self.tokens = 1

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens = _rows(args, kwargs)
        self.conductor.begin(self.place, self.tokens)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Nothing is to be done when a block was called."""


class _Listed:
    """One expert of a list."""

    def __init__(self, block_pass: _Pass, expert: int, ensure: Callable[[], None]) -> None:
        self._pass = block_pass
        self._expert = expert
        self._ensure = ensure
        self._steps: list[Any] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ensure()
        conductor, place = self._pass.conductor, self._pass.place
        conductor.lock.acquire()
        try:
            step = conductor.each(place, {self._expert: min(_rows(args, kwargs), self._pass.tokens)}, self._pass.tokens)
            _, tensors = next(step)
            self._show(tuple(_parameter(tensor) for tensor in tensors or ()))
            self._steps.append(step)
        except BaseException:
            conductor.lock.release()
            raise

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self._steps:
            return
        step = self._steps.pop()
        try:
            home = self._pass.conductor.seats[self._pass.place].home
            size = len(home.bank.attributes)
            self._show(tuple(home.parameters[self._expert * size : (self._expert + 1) * size]))
            for _ in step:
                pass
        finally:
            self._pass.conductor.lock.release()

    def _show(self, parameters: tuple[nn.Parameter, ...]) -> None:
        bank = self._pass.conductor.seats[self._pass.place].home.bank
        for weight, parameter in zip(bank.weights_of(self._expert), parameters, strict=True):
            owner = weight.owners[0]
            owner.module._parameters[owner.attribute] = parameter
