"""Which experts the next block will ask for: its router is run early, on what the present block's experts are given.

Note [why this works]. Each block adds a little to the hidden states, so that the next router's input is much like this one's: with trained
models 83 % of the next layer's experts are found that way (FACTS of MoE-Infinity and its successors give 73 to 90 %). What is wrong costs a
read that nobody needed, so only as much is asked for as comes in while the link would be idle.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.experts.bank import Bank

_log = logging.getLogger("overflowml")

_ROUTERS = ("gate", "router")
"""What blocks call the module that chooses experts, beside their bank (transformers 5.23, models/*/modeling_*.py)."""

_LEAST_PRECISION = 0.3
"""With fewer of the expected experts asked for, expecting does more harm than good: each one takes another's place."""

_PROBE_EVERY = 64
"""Passes between two tries where it was given up."""

_MOST_FAILURES = 8
"""Passes in a row in which a router could not be asked; then it is let be."""

_WEIGHT = 0.1
"""Of the newest value in a moving average."""


def router_of(block: nn.Module | None, bank: Bank) -> nn.Module | None:
    """The router beside a bank; None where there is none by a name that is known."""
    if block is None:
        return None
    for parent in block.modules():
        if any(child is bank.module for child in parent.children()):
            for name in _ROUTERS:
                router = getattr(parent, name, None)
                if isinstance(router, nn.Module):
                    return router
    return None


class Foresight:
    """Expects experts of one bank."""

    def __init__(self, router: nn.Module, count: int, per_token: int) -> None:
        """Expect nothing yet.

        Args:
            router: of the bank.
            count: experts of it.
            per_token: of them, how many a token is routed to.
        """
        self._router = router
        self._count, self._per_token = count, per_token
        self._failures = 0
        self.precision = 0.5
        """Share of those expected that were asked for, of late."""
        self.idle_s = 0.0
        """Between the end of the bank before and the call of this one, of late."""
        self._passes = 0

    def choices(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The experts that the router would choose for these hidden states: (tokens, per_token) numbers, the likeliest first; None where
        it cannot be asked."""
        self._passes += 1
        if self._failures >= _MOST_FAILURES or self._passes == 1 or (self.precision < _LEAST_PRECISION and self._passes % _PROBE_EVERY):
            return None
        try:
            # Past its hooks: who records what a router chooses shall not see choices that nobody made.
            found = self._indices(self._router.forward(hidden))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            # It wants more than hidden states, or is not on the device yet; nothing depends on it.
            _log.debug("%s cannot be asked ahead of time: %s", type(self._router).__name__, error)
            found = None
        self._failures = 0 if found is not None else self._failures + 1
        return found

    def _indices(self, output: Any) -> torch.Tensor | None:
        tensors = [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, torch.Tensor)]
        for tensor in reversed(tensors):
            if not tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[-1] == self._per_token:
                return tensor
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[-1] == self._count:
                return tensor.topk(self._per_token, dim=-1).indices
        return None

    def learn(self, hits: int, wasted: int) -> None:
        """Count what became of those that were expected."""
        if hits + wasted:
            self.precision += _WEIGHT * (hits / (hits + wasted) - self.precision)

    def saw_idle(self, seconds: float) -> None:
        """The time between two banks in which nothing was brought in."""
        self.idle_s += _WEIGHT * (seconds - self.idle_s)

    def allowance(self, record_bytes: int, bytes_per_s: float) -> int:
        """How many experts may be brought in ahead of time."""
        if bytes_per_s <= 0:
            return self._per_token
        return max(1, round(self.idle_s * bytes_per_s / record_bytes))
