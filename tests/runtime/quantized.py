"""Tiny quantized models, by torchao itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

torchao = pytest.importorskip("torchao.quantization")

CONFIGS: dict[str, Any] = {
    "int8": torchao.Int8WeightOnlyConfig,
    "fp8": torchao.Float8WeightOnlyConfig,
    "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
    "intx": torchao.IntxWeightOnlyConfig,
}


def quantized(module: nn.Module, config: str = "int8") -> Any:
    """The same module in bfloat16, with the weights of its linear layers quantized."""
    module.to(torch.bfloat16)
    torchao.quantize_(module, CONFIGS[config]())
    return module
