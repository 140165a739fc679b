"""Copies between host and device and within the device: who blocks, which engine, and when the bytes really move."""

from __future__ import annotations

from typing import Any

import torch

from .clock import Engine, StreamState
from .device import DEVICE, accelerator_error
from .memory import alias, byte_range, is_device, span
from .pinned import is_pinned, pin_storage

_POISON = 0xFF  # every float format reads this as NaN, integers as -1 or the largest


def copy_(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`dst.copy_(src)` where at least one side is on the device."""
    with DEVICE.lock:
        if is_device(dst) and is_device(src):
            _within_device(dst, src)
        elif is_device(dst):
            _to_device(dst, src, bool(non_blocking))
        else:
            _to_host(dst, src, bool(non_blocking))
    return dst


def _within_device(dst: torch.Tensor, src: torch.Tensor) -> None:
    clock = DEVICE.clock
    stream = clock.begin("copy_d2d", [span(src)], [span(dst)])
    clock.land(stream)
    alias(dst).copy_(alias(src))
    clock.place("compute", "copy_d2d", 2 * dst.nbytes / DEVICE.config.memory_bytes_per_s, stream)


def _to_device(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool) -> None:
    clock = DEVICE.clock
    _count("copy_h2d", dst)
    # detached: when the copy lands, autograd may be on and would record it on the alias
    target, source = alias(dst), src.detach()
    in_background = non_blocking and is_pinned(src) and _is_one_transfer(dst, src)
    stream = clock.begin("copy_h2d", [], [span(dst)])
    if in_background:
        DEVICE.hazard_checks.watch_source(stream.id, stream.tick, src.data_ptr(), src.nbytes, src.untyped_storage())
    _transfer("h2d", target, source, stream, in_background)


def _to_host(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool) -> None:
    clock = DEVICE.clock
    _count("copy_d2h", dst)
    target, source = dst.detach(), alias(src)
    in_background = non_blocking and is_pinned(dst) and _is_one_transfer(dst, src)
    stream = clock.begin("copy_d2h", [span(src)], [])
    DEVICE.hazard_checks.forget_sources(dst.data_ptr(), dst.nbytes)
    clock.land(stream)  # what is queued may read the host bytes that are about to be poisoned
    _transfer("d2h", target, source, stream, in_background)


def _transfer(engine: Engine, target: torch.Tensor, source: torch.Tensor, stream: StreamState, in_background: bool) -> None:
    clock, config, op = DEVICE.clock, DEVICE.config, f"copy_{engine}"
    seconds = target.nbytes / (config.h2d_bytes_per_s if engine == "h2d" else config.d2h_bytes_per_s)
    if in_background and config.defer_copies:
        if engine == "h2d" and any(land.reads_device for _, land in stream.queue):
            clock.land(stream)  # a queued copy out may read the device bytes that are about to be poisoned
        if target.numel():
            _poison(target)
        clock.defer(stream, _Landing(target, source, reads_device=engine == "d2h"))
    else:
        clock.land(stream)
        target.copy_(source)
    clock.place(engine, op, seconds, stream)
    if not in_background:
        clock.synchronize(stream)


class _Landing:
    """The bytes move when this is called. It keeps them alive, but not the device allocation: freeing early shows."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor, reads_device: bool) -> None:
        self.target, self.source, self.reads_device = target, source, reads_device

    def __call__(self) -> None:
        # of all modes the one that may write both to inference tensors and to normal ones
        with torch.inference_mode():
            self.target.copy_(self.source)


def _poison(dense: torch.Tensor) -> None:
    lo, hi = byte_range(dense)
    with torch.inference_mode(False), torch.no_grad():
        torch.empty(0, dtype=torch.uint8).set_(dense.untyped_storage(), lo, (hi - lo,), (1,)).fill_(_POISON)


def _is_one_transfer(dst: torch.Tensor, src: torch.Tensor) -> bool:
    """Whether the copy is one memcpy. Else CUDA goes through a temporary, which is pageable on the host's side."""
    same = dst.dtype == src.dtype and dst.shape == src.shape
    plain = dst.is_neg() == src.is_neg() and dst.is_conj() == src.is_conj()
    if not (same and plain):
        return False
    lo, hi = byte_range(dst)
    dense_alike = dst.stride() == src.stride() and hi - lo == dst.nbytes
    return bool(dense_alike or (dst.is_contiguous() and src.is_contiguous()))


def _count(op: str, dst: torch.Tensor) -> None:
    if DEVICE.fails_now("copy"):
        raise accelerator_error(f"vgpu error: {op} of {dst.nbytes} bytes failed (injected fault)")


def to_copy(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """`tensor.to(...)` of a device tensor. As on CUDA, non_blocking to the host goes to new pinned memory."""
    device = device or self.device
    options: dict[str, Any] = {"dtype": dtype or self.dtype, "device": device}
    result = torch.empty_like(self, memory_format=memory_format or torch.preserve_format, **options)
    if device.type == "cpu" and non_blocking:
        pin_storage(result)
    return result.copy_(self, non_blocking)
