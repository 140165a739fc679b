"""What an expert computes, and how the results of several become one: as transformers' own implementations do it, to the bit.

``torch.mm`` for each expert is what ``torch.nn.functional.grouped_mm`` does on CPUs and what the eager implementations do everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from overflowml_core.runtime.experts.encoded import Matrix, Operand


def expert_output(module: Any, x: torch.Tensor, tensors: Sequence[Operand], normed: bool = True) -> torch.Tensor:
    """The output of one expert, before its weights of routing.

    Args:
        module: behind transformers' experts interface; tells what is done between the matrices.
        x: (rows, hidden) the tokens that it is given.
        tensors: its first and second matrix, and their biases where it has some.
        normed: apply the norm behind the expert, where the module has one.
    """
    y = _product(x, tensors[0], module.is_transposed)
    if module.has_bias:
        y = y + tensors[2]
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _product(y, tensors[1], module.is_transposed)
    if module.has_bias:
        y = y + tensors[3]
    if normed and getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    return y


def _product(x: torch.Tensor, matrix: Operand, is_transposed: bool) -> torch.Tensor:
    if isinstance(matrix, Matrix):
        return matrix.product(x)
    return torch.mm(x.to(matrix.dtype), matrix if is_transposed else matrix.t())


def summed_by_token(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add up as ``grouped_mm`` and ``batched_mm`` do.

    Args:
        outputs: (tokens * k, hidden) sorted by expert.
        order: (tokens * k) which pair of token and choice stands in each row.
        weights: (tokens, k) of routing.
        like: (tokens, hidden) gives shape and dtype of the sum.
    """
    weighted = outputs * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return weighted[back].view(weights.shape[0], weights.shape[1], -1).sum(dim=1).to(like.dtype)


def summed_by_expert(
    outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, like: torch.Tensor, ends: Sequence[int]
) -> torch.Tensor:
    """Add up as the eager implementations do: expert after expert.

    Args:
        outputs, order, weights, like: as for :func:`summed_by_token`.
        ends: of each expert's rows, the first row behind them.
    """
    total = torch.zeros_like(like)
    flat, tokens, first = weights.reshape(-1), order // weights.shape[1], 0
    for end in ends:
        if end > first:
            weighted = outputs[first:end] * flat[order[first:end]].unsqueeze(-1)
            total.index_add_(0, tokens[first:end], weighted.to(total.dtype))
        first = end
    return total
