"""diffusers' weights in the formats of GGUF, as a kind of tensor that the runtime can take apart. Does not import diffusers."""

from __future__ import annotations

import sys
from typing import Any

from overflowml_core.runtime.parts import Kind, register_kind


def know_packed_weights() -> None:
    """Register the host's class for packed weights, where the host has one by now."""
    utils = sys.modules.get("diffusers.quantizers.gguf.utils")
    if utils is not None and hasattr(utils, "GGUFParameter"):
        register_kind(utils.GGUFParameter, Kind(_plain, _dressed, _shape, _label))


def _plain(weight: Any) -> Any:
    return weight.as_tensor().detach()


def _dressed(like: Any, plain: Any) -> Any:
    return type(like)(plain, requires_grad=False, quant_type=like.quant_type)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in weight.quant_shape)


def _label(weight: Any) -> str:
    return str(weight.quant_type.name)
