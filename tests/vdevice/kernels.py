"""Operators that the fallback cannot serve, and why each one is here; `KERNELS` is what gets registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .copies import copy_, to_copy
from .device import DEVICE
from .dispatch import fallback
from .memory import alias, block_of, is_device, redispatch, span, to_device

_aten = torch.ops.aten


def _copy_from(src: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return copy_(dst, src, non_blocking)


def _copy_from_and_resize(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    return copy_(dst.resize_(src.shape), src)


def _has_compatible_shallow_copy_type(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return True  # lets `parameter.data = device_tensor` change the device, as on CUDA


def _set_storage_at(
    self: torch.Tensor, source: torch.UntypedStorage, offset: int, size: Sequence[int], stride: Sequence[int] = ()
) -> torch.Tensor:
    result: torch.Tensor = redispatch(_aten.set_.source_Storage_storage_offset, self, source, offset, size, stride)
    return result


def _set_storage(self: torch.Tensor, source: torch.UntypedStorage) -> torch.Tensor:
    return _set_storage_at(self, source, 0, (source.nbytes() // self.element_size(),), (1,))


def _set_tensor(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return _set_storage_at(self, source.untyped_storage(), source.storage_offset(), source.shape, source.stride())


def _resize_(self: torch.Tensor, size: Sequence[int], memory_format: torch.memory_format | None = None) -> torch.Tensor:
    shape = tuple(size)
    count = torch.Size(shape).numel()
    if (count + self.storage_offset()) * self.element_size() > self.untyped_storage().nbytes():
        return self.set_(torch.empty(shape, dtype=self.dtype, device=self.device))
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return _set_storage_at(self, self.untyped_storage(), self.storage_offset(), shape, strides[::-1])


def _record_stream(self: torch.Tensor, stream: torch.Stream) -> None:
    block_of(self).shared_with.add(stream.stream_id)


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """One fused operator, as flash attention on a GPU: decomposed, it would put an L x L matrix into memory."""
    inputs = [x for x in (query, key, value, attn_mask) if x is not None]
    if not all(is_device(x) for x in inputs):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted({str(x.device) for x in inputs}))}! (scaled_dot_product_attention)"
        )
    with DEVICE.lock:
        stream = DEVICE.clock.begin("aten::scaled_dot_product_attention", [span(x) for x in inputs], [])
        DEVICE.clock.land(stream)
        q, k, v = (alias(x) for x in (query, key, value))
        mask = None if attn_mask is None else alias(attn_mask)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)
        result = to_device(out)
        flop = 4 * out.numel() * key.shape[-2]
        DEVICE.clock.place("compute", "aten::scaled_dot_product_attention", flop / DEVICE.config.flop_per_s, stream)
        return result


def _histc(self: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """CUDA takes integers, the CPU kernel does not."""
    values = self if self.is_floating_point() else self.float()
    result: torch.Tensor = fallback(_aten.histc.default, values, bins, min, max).to(self.dtype)
    return result


def _convolution(*args: Any) -> Any:
    """What the composite convolution calls for a device it does not know."""
    return fallback(_aten.convolution.default, *args)


KERNELS: dict[str, Callable[..., Any]] = {
    # copy_ itself, not only _copy_from: the Conjugate and Negative keys let copy_ through with lazy bits unresolved
    "copy_": copy_,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    # the composite asks C++ for a pinned allocator, which a Python device cannot have
    "_to_copy": to_copy,
    "_has_compatible_shallow_copy_type": _has_compatible_shallow_copy_type,
    "set_.source_Storage_storage_offset": _set_storage_at,
    "set_.source_Storage": _set_storage,
    "set_.source_Tensor": _set_tensor,
    "resize_": _resize_,
    "record_stream": _record_stream,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "histc": _histc,
    "convolution_overrideable": _convolution,
}
