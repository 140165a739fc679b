"""Leaves weights unread that lie in a file one to one, and notes where they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from overflowml_core.inspect import Checkpoint, checkpoint_of_files
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.structure import TORCH_DTYPES


def defer_weights(
    model: Any,
    state_dict: dict[str, torch.Tensor] | None,
    files: Iterable[str],
    dtype: torch.dtype | None,
    keep_in_fp32: list[str],
    request: Loading,
) -> dict[str, torch.Tensor]:
    """Give the model parameters without data for everything that can be read from its files later.

    Args:
        model: on the meta device, in its final structure.
        state_dict: of a single file, mapped and with deprecated keys renamed; None for shards.
        files: safetensors.
        dtype: that the user asked for; None leaves that of the model's own construction.
        keep_in_fp32: parts of names that stay in float32.
        request: notes the origins.

    Returns:
        What the host must load as always.

    Raises:
        BadCheckpoint: a file is missing or broken.
    """
    checkpoint = checkpoint_of_files([Path(name) for name in files])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    deferred: set[str] = set()
    for name, located in checkpoint.tensors.items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.is_meta or located.entry.dtype not in TORCH_DTYPES:
            continue
        if tuple(parameter.shape) != located.entry.shape or (state_dict is not None and name not in state_dict):
            continue
        stored = TORCH_DTYPES[located.entry.dtype]
        data = torch.empty(parameter.shape, dtype=final_dtype(name, stored, parameter.dtype, dtype, keep_in_fp32), device="meta")
        placed = replace_parameter(model, name, data)
        request.defer(
            placed, Origin(located.path, located.entry.offset_bytes, located.entry.nbytes, located.entry.dtype, located.entry.shape)
        )
        deferred.add(name)
    if request.describe_only:
        _cast_buffers(model, checkpoint, dtype, keep_in_fp32)
        return {}
    if state_dict is not None:
        return {name: tensor for name, tensor in state_dict.items() if name not in deferred}
    left: dict[str, torch.Tensor] = {}
    for path in checkpoint.files:
        with safe_open(path, framework="pt") as opened:
            left.update((name, opened.get_tensor(name)) for name in opened.keys() if name not in deferred)  # noqa: SIM118 -- no mapping
    return left


def final_dtype(name: str, stored: torch.dtype, built: torch.dtype, asked: torch.dtype | None, keep_in_fp32: list[str]) -> torch.dtype:
    """The dtype of a weight after the host's load_model_dict_into_meta: ``stored`` in the file, ``built`` by the model, ``asked`` for."""
    if asked is None:
        return built
    if not stored.is_floating_point:
        return stored
    return torch.float32 if any(part in name.split(".") for part in keep_in_fp32) else asked


def _cast_buffers(model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None, keep_in_fp32: list[str]) -> None:
    """For a description: buffers that the checkpoint holds get the dtype in which the host would load them."""
    buffers = dict(model.named_buffers())
    for name, located in checkpoint.tensors.items():
        buffer, stored = buffers.get(name), TORCH_DTYPES.get(located.entry.dtype)
        if buffer is not None and stored is not None:
            path, _, attribute = name.rpartition(".")
            final = final_dtype(name, stored, buffer.dtype, dtype, keep_in_fp32)
            model.get_submodule(path)._buffers[attribute] = torch.empty(buffer.shape, dtype=final, device="meta")


def replace_parameter(model: Any, name: str, data: torch.Tensor) -> nn.Parameter:
    """Put a parameter over this tensor in the place of another one, and return it."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    parameter = nn.Parameter(data, requires_grad=module._parameters[attribute].requires_grad and data.is_floating_point())
    module._parameters[attribute] = parameter
    return parameter
