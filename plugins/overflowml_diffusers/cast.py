"""Casts of a module under a trace: pipelines decode in float32 with a VAE kept in float16, and torch casts nothing that has no data."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from overflowml_core.runtime.fake import Tracer


class Casts:
    """Lets ``to`` of a watched module, and of every part of it, change its dtype; devices stay as they are.

    The weights count as weights after a cast too. What they take beyond what the module took before counts as an activation: no plan counts
    it among the weights.
    """

    def __init__(self, module: nn.Module, tracer: Tracer) -> None:
        self._tracer = tracer
        self._like = next(module.parameters())
        self._grown_bytes = 0
        self._held: torch.Tensor | None = None
        for inner in module.modules():
            vars(inner)["to"] = partial(self._to, inner)

    def _to(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is None:
            return module
        cast: dict[int, nn.Parameter] = {}
        for inner in module.modules():
            for name, parameter in inner._parameters.items():
                if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
                    continue
                if id(parameter) not in cast:
                    cast[id(parameter)] = self._weight(parameter, dtype)
                inner._parameters[name] = cast[id(parameter)]
            for name, buffer in inner._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    inner._buffers[name] = buffer.to(dtype)
        self._held = self._like.new_empty(self._grown_bytes, dtype=torch.uint8) if self._grown_bytes > 0 else None
        return module

    def _weight(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        made = nn.Parameter(parameter.new_empty(parameter.shape, dtype=dtype), requires_grad=False)
        self._tracer.memory.exclude(made, is_weight=True)
        self._grown_bytes += made.nbytes - parameter.nbytes
        return made
