"""What the virtual accelerator promises of copies: who blocks, what is late, what is pinned."""

from __future__ import annotations

import pytest
import torch

from tests.vdevice import Config, HazardError, install, register_pinned, unregister_pinned

MIB = 1 << 20


def test_late_copy_poisons_its_destination_until_something_waits() -> None:
    install(Config(hazards="off"))
    host, x = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu")
    stream, copied = torch.vgpu.Stream(), torch.vgpu.Event()
    with torch.vgpu.stream(stream):
        x.copy_(host, non_blocking=True)
        copied.record(stream)
    assert x.isnan().all().item()
    torch.vgpu.current_stream().wait_event(copied)
    assert x.sum().item() == 16


def test_event_lands_only_the_copies_before_it() -> None:
    install(Config(hazards="off"))
    first, second = torch.empty(4, device="vgpu"), torch.empty(4, device="vgpu")
    host, copied = torch.ones(4, pin_memory=True), torch.vgpu.Event()
    with torch.vgpu.stream(torch.vgpu.Stream()):
        first.copy_(host, non_blocking=True)
        copied.record()
        second.copy_(host, non_blocking=True)
    copied.synchronize()
    assert first.sum().item() == 4
    assert second.isnan().all().item()


def test_copy_on_the_same_stream_has_landed_for_the_next_operator() -> None:
    x, host = torch.empty(4, device="vgpu"), torch.ones(4, pin_memory=True)
    x.copy_(host, non_blocking=True)
    assert (x + x).sum().item() == 8


def test_late_copy_reads_its_source_late() -> None:
    device = install(Config(hazards="record"))
    host, x = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu")
    copied = torch.vgpu.Event()
    x.copy_(host, non_blocking=True)
    copied.record()
    host.fill_(5)  # a staging buffer reused too early
    copied.synchronize()
    assert x.sum().item() == 80
    assert any("the host overwrote 64 pinned bytes" in h for h in device.hazards)


def test_source_overwritten_after_a_stream_wait_is_a_hazard() -> None:
    host, x, copied = torch.ones(16, pin_memory=True), torch.empty(16, device="vgpu"), torch.vgpu.Event()
    torch.vgpu.synchronize()
    with torch.vgpu.stream(torch.vgpu.Stream()):
        x.copy_(host, non_blocking=True)
        copied.record()
    copied.wait()  # orders the device, tells the host nothing
    y = x + 1
    host.zero_()
    with pytest.raises(HazardError, match="before it knew"):
        torch.vgpu.synchronize()
    assert y.tolist() == [2] * 16


def test_pinned_copies_run_in_the_background_and_pageable_ones_block() -> None:
    device = install(Config(h2d_bytes_per_s=1e9))
    x = torch.empty(MIB, dtype=torch.uint8, device="vgpu")
    pageable = torch.zeros(MIB, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    assert pinned.is_pinned()
    assert pinned[5:9].is_pinned()
    assert not pageable.is_pinned()

    def host_seconds(source: torch.Tensor) -> float:
        torch.vgpu.synchronize()
        before = device.clock.host_s
        x.copy_(source, non_blocking=True)
        return device.clock.host_s - before

    assert host_seconds(pageable) == pytest.approx(MIB / 1e9)
    assert host_seconds(pinned) == 0


def test_copy_to_the_host_in_the_background_is_late_too() -> None:
    x = torch.ones(4, device="vgpu")
    host = x.to("cpu", non_blocking=True)  # new pinned memory, as on CUDA
    assert host.is_pinned()
    assert host.isnan().all()
    torch.vgpu.synchronize()
    assert host.tolist() == [1] * 4


def test_late_copy_lands_outside_the_inference_mode_it_was_issued_in() -> None:
    with torch.inference_mode():
        x, staged = torch.ones(4, device="vgpu"), torch.full((4,), 2.0, pin_memory=True)
        host = x.to("cpu", non_blocking=True)
        y = torch.empty(4, device="vgpu")
        y.copy_(staged, non_blocking=True)
    torch.vgpu.synchronize()
    assert (host.tolist(), y.tolist()) == ([1] * 4, [2] * 4)


def test_buffer_reused_in_both_directions_keeps_stream_order() -> None:
    device = install()
    host, a, b = torch.ones(4, pin_memory=True), torch.empty(4, device="vgpu"), torch.full((4,), 3.0, device="vgpu")
    a.copy_(host, non_blocking=True)
    host.copy_(b, non_blocking=True)
    b.copy_(torch.full((4,), 9.0, pin_memory=True), non_blocking=True)
    torch.vgpu.synchronize()
    assert (a.tolist(), host.tolist(), b.tolist()) == ([1] * 4, [3] * 4, [9] * 4)
    assert device.hazards == []


def test_pinned_budget_and_registration() -> None:
    base = install().pinned_bytes  # another test's tensors may still be alive
    device = install(Config(pinned_bytes=base + (1 << 12)))
    plain = torch.zeros(1 << 11, dtype=torch.uint8)
    register_pinned(plain)
    assert plain[100:].is_pinned()
    assert device.pinned_bytes - base == 1 << 11
    with pytest.raises(RuntimeError, match="already pinned"):
        register_pinned(plain[:16])
    with pytest.raises(RuntimeError, match=r"Tried to pin \d+ bytes"):
        torch.empty(1 << 12, dtype=torch.uint8, pin_memory=True)
    unregister_pinned(plain)
    assert not plain.is_pinned()
    with pytest.raises(RuntimeError, match="not been registered"):
        unregister_pinned(plain)
    held = torch.empty(1 << 10, dtype=torch.uint8, pin_memory=True)[1:]
    assert device.pinned_bytes - base == 1 << 10
    del held
    assert device.pinned_bytes == base
