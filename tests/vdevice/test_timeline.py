"""What the virtual accelerator promises of streams, events and threads: exact overlap, and no race unseen."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from tests.vdevice import Config, HazardError, SimDevice, install

MIB = 1 << 20


# ---- time line


LAYERS, ROWS, WIDTH = 8, 128, 512
COPY_S, COMPUTE_S = WIDTH * WIDTH * 4 / 1e9, 0.5e-3


def stream_layers(slots: int, wait_copy: bool = True, wait_free: bool = True) -> tuple[float, torch.Tensor, SimDevice]:
    """Layers of 1 MiB at 1 GB/s through `slots` slots, 0.5 ms of compute each; returns seconds and result."""
    device = install(
        Config(
            h2d_bytes_per_s=1e9,
            flop_per_s=2 * ROWS * WIDTH * WIDTH / COMPUTE_S,
            memory_bytes_per_s=1e18,
            budget_bytes=64 * MIB,
        )
    )
    torch.manual_seed(0)
    host = [torch.randn(WIDTH, WIDTH).div_(WIDTH**0.5).pin_memory() for _ in range(LAYERS)]
    buffers = [torch.empty(WIDTH, WIDTH, device="vgpu") for _ in range(slots)]
    x = torch.randn(ROWS, WIDTH).to("vgpu")
    main, copies = torch.vgpu.current_stream(), torch.vgpu.Stream(device="vgpu")
    copied, free = [torch.vgpu.Event() for _ in host], [torch.vgpu.Event() for _ in host]
    torch.vgpu.synchronize()
    began = device.elapsed()

    def request(i: int) -> None:
        with torch.vgpu.stream(copies):
            if i >= slots and wait_free:
                copies.wait_event(free[i - slots])
            buffers[i % slots].copy_(host[i], non_blocking=True)
            copied[i].record(copies)

    for i in range(slots):
        request(i)
    for i in range(LAYERS):
        if wait_copy:
            main.wait_event(copied[i])
        x = x @ buffers[i % slots]
        free[i].record(main)
        if i + slots < LAYERS:
            request(i + slots)
    torch.vgpu.synchronize()
    return device.elapsed() - began, x, device


def test_one_slot_does_not_overlap() -> None:
    seconds, _, device = stream_layers(1)
    assert seconds == pytest.approx(LAYERS * (COPY_S + COMPUTE_S), abs=1e-12)
    assert device.hazards == []


def test_two_slots_hide_the_compute_behind_the_copies() -> None:
    seconds, x, device = stream_layers(2)
    assert seconds == pytest.approx(LAYERS * COPY_S + COMPUTE_S, abs=1e-12)
    assert device.busy("h2d") == pytest.approx(LAYERS * COPY_S + ROWS * WIDTH * 4 / 1e9, abs=1e-12)
    copies = [e for e in device.log if e.engine == "h2d"][1:]
    products = [e for e in device.log if e.op == "aten::mm"]
    assert len(copies) == len(products) == LAYERS
    assert copies[1].start_s < products[0].end_s  # the copy of the next layer runs while this one computes
    _, same, _ = stream_layers(1)
    assert torch.equal(x.cpu(), same.cpu())
    assert x.isfinite().all().item()


def test_missing_wait_for_the_copy_is_a_hazard() -> None:
    with pytest.raises(HazardError, match="RAW hazard: aten::mm"):
        stream_layers(2, wait_copy=False)


def test_missing_wait_for_the_slot_is_a_hazard() -> None:
    with pytest.raises(HazardError, match="WAR hazard: copy_h2d"):
        stream_layers(2, wait_free=False)


def test_use_on_another_stream_right_after_allocation_is_a_hazard() -> None:
    slot, host = torch.empty(4, device="vgpu"), torch.ones(4, pin_memory=True)
    with torch.vgpu.stream(torch.vgpu.Stream()), pytest.raises(HazardError, match=r"WAW hazard.*after allocation"):
        slot.copy_(host, non_blocking=True)


def test_free_while_another_stream_uses_the_bytes_is_a_hazard() -> None:
    device, other = install(Config(hazards="record")), torch.vgpu.Stream()
    for name, shared in (("plain", False), ("recorded", True)):
        a = torch.ones(8, device="vgpu")
        other.wait_stream(torch.vgpu.current_stream())
        with torch.vgpu.stream(other):
            b = a * 2
        if shared:
            a.record_stream(other)
        device.hazards.clear()
        del a
        assert any("was freed while aten::mul" in h for h in device.hazards) is not shared, name
        del b


def test_free_hazard_is_raised_by_the_next_call() -> None:
    other, a = torch.vgpu.Stream(), torch.ones(8, device="vgpu")
    other.wait_stream(torch.vgpu.current_stream())
    with torch.vgpu.stream(other):
        b = a * 2
    del a
    with pytest.raises(HazardError, match="was freed while"):
        torch.vgpu.synchronize()
    torch.vgpu.synchronize()
    assert b.tolist() == [2] * 8


def test_elapsed_time_and_query_polling() -> None:
    install(Config(h2d_bytes_per_s=1e6))
    begin, end = torch.vgpu.Event(enable_timing=True), torch.vgpu.Event(enable_timing=True)
    x, host = torch.empty(1000, dtype=torch.uint8, device="vgpu"), torch.ones(1000, dtype=torch.uint8, pin_memory=True)
    assert end.query()  # never recorded
    begin.record()
    x.copy_(host, non_blocking=True)
    end.record()
    polls = 0
    while not end.query():
        polls += 1
    assert 0 < polls <= 1001
    assert begin.elapsed_time(end) == pytest.approx(1.0)
    host.zero_()  # the host knows that the copy is done
    assert x.sum().item() == 1000


# ---- threads


def test_threads_allocate_and_free_without_losing_a_byte() -> None:
    device = install(Config(budget_bytes=8 * MIB, hazards="off"))
    base = device.allocated_bytes

    def work() -> None:
        for _ in range(150):
            a = torch.empty(100, device="vgpu")
            b = a * 2
            b[1:] + 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert device.allocated_bytes == base


def test_reader_thread_reuses_its_staging_buffer_safely() -> None:
    """A thread of its own fills one pinned buffer, copies, waits for the event, and fills it again."""
    device = install(Config(h2d_bytes_per_s=1e6))
    slots = [torch.empty(1000, dtype=torch.uint8, device="vgpu") for _ in range(4)]
    torch.vgpu.synchronize()
    copied = [torch.vgpu.Event() for _ in slots]
    issued = [threading.Event() for _ in slots]

    def read() -> None:
        stream, staging = torch.vgpu.Stream(), torch.empty(1000, dtype=torch.uint8, pin_memory=True)
        assert torch.vgpu.current_stream() == torch.vgpu.default_stream()
        with torch.vgpu.stream(stream):
            for i, slot in enumerate(slots):
                device.advance(1e-3)  # the disk
                staging.fill_(i + 1)
                slot.copy_(staging, non_blocking=True)
                copied[i].record(stream)
                issued[i].set()
                copied[i].synchronize()

    thread = threading.Thread(target=read)
    thread.start()
    sums = []
    for i, slot in enumerate(slots):
        assert issued[i].wait(timeout=60)
        assert device.clock.host_s == 0  # the reader's waits do not delay this thread's launches
        torch.vgpu.current_stream().wait_event(copied[i])
        sums.append(slot.sum(dtype=torch.int64))
    thread.join()
    assert [s.item() for s in sums] == [1000, 2000, 3000, 4000]
    assert device.elapsed() == pytest.approx(8e-3, rel=1e-3)
    assert device.hazards == []
