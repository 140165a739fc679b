"""Blocks that are large enough for reads past the page cache: the same results, within the budget, straight into the slots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import FileChanged
from overflowml_core.runtime.chunks import LEAST_DIRECT_BYTES
from tests.runtime.build import job, on_meta, rows, same, save, slots_budget, stack, twice
from tests.runtime.conftest import Virtual
from tests.runtime.test_reader_large import DIRECT, has_direct_reads, is_direct
from tests.runtime.test_streaming import call, on_device

WIDTH, HIDDEN = 256, 640
SPARE_BYTES = 2**20


@pytest.fixture(scope="module")
def module() -> nn.Module:
    made = stack(4, WIDTH, hidden=HIDDEN, bias=True)
    assert sum(p.nbytes for p in made.blocks[0].parameters()) > LEAST_DIRECT_BYTES
    return made


@pytest.fixture
def direct_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read past the page cache."""
    made: list[int] = []
    true = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        got = true(descriptor, views, offset)
        if is_direct(descriptor):
            made.append(got)
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def unread(module: nn.Module, folder: Path, metadata_bytes: int = 0):
    """A twin of which nothing is read; metadata moves the weights in the file."""
    path = save(dict(module.named_parameters()), folder / "model.safetensors")
    if metadata_bytes:
        from safetensors.torch import save_file

        save_file({n: p.data.clone() for n, p in module.named_parameters()}, path, metadata={"pad": "x" * metadata_bytes})
    return (*on_meta(module, path), path)


@pytest.mark.parametrize("metadata_bytes", [0, 300, 3000])
def test_blocks_are_read_past_the_page_cache_straight_into_their_slots(
    metadata_bytes: int, module: nn.Module, tmp_path: Path, direct_bytes: list[int]
) -> None:
    expected = module(rows(WIDTH))
    twin, loading, path = unread(module, tmp_path, metadata_bytes)
    task = job(twin, loading=loading, budget_bytes=slots_budget(module, 2, 1) + SPARE_BYTES)
    engine = task.attach(tmp_path / "store")
    for _ in range(5):
        assert same(twin(rows(WIDTH)), expected)
    engine._phases[0].streamer.close()
    if has_direct_reads(path):
        # All but the ends of each block, which share a page with its neighbours.
        assert sum(direct_bytes) >= 0.9 * engine._reader.bytes_read > 0
    assert engine.device.arenas.peak_bytes <= task.budget_bytes
    assert engine.device.arenas.held_bytes <= engine.plan.phases[0].device_bytes
    engine.detach()
    assert engine.device.arenas.held_bytes == 0


@pytest.mark.parametrize("spare_bytes", [0, 100, 8192])
def test_without_a_byte_to_spare_blocks_lie_as_slabs_and_results_are_the_same(spare_bytes: int, module: nn.Module, tmp_path: Path) -> None:
    expected = module(rows(WIDTH))
    twin, loading, _ = unread(module, tmp_path)
    task = job(twin, loading=loading, budget_bytes=slots_budget(module, 2, 1) + spare_bytes)
    engine = task.attach(tmp_path / "store")
    for _ in range(3):
        assert same(twin(rows(WIDTH)), expected)
    assert engine.device.arenas.peak_bytes <= task.budget_bytes
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), module.parameters(), strict=True))
    engine.detach()


@pytest.mark.skipif(not DIRECT, reason="this system has no direct reads")
def test_a_file_that_is_written_to_between_passes_is_an_error_and_not_garbage(module: nn.Module, tmp_path: Path) -> None:
    twin, loading, path = unread(module, tmp_path)
    then = path.stat().st_mtime_ns - 10**9
    os.utime(path, ns=(then, then))
    with job(twin, loading=loading).attached(tmp_path / "store"):
        twin(rows(WIDTH))
        with path.open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(b"garbage!")
        with pytest.raises(FileChanged, match=r"model\.safetensors: expected"):
            twice(lambda: twin(rows(WIDTH)))  # the slots may still hold what was read before


@pytest.mark.parametrize("metadata_bytes", [0, 300])
def test_the_ring_is_read_into_directly_where_it_starts_on_a_page(
    metadata_bytes: int, module: nn.Module, tmp_path: Path, vgpu: Virtual, direct_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = vgpu.device._pinned_buffer

    def on_a_page(nbytes: int) -> torch.Tensor:
        buffer = true(nbytes + 4096)
        start = -buffer.data_ptr() % 4096
        return buffer[start : start + nbytes]

    monkeypatch.setattr(vgpu.device, "_pinned_buffer", on_a_page)
    expected = on_device(module, rows(WIDTH))
    twin, loading, path = unread(module, tmp_path, metadata_bytes)
    with job(twin, vgpu.device, budget_bytes=slots_budget(module, 2, 1), tier="disk", loading=loading).attached(tmp_path / "store"):
        for _ in range(3):
            assert same(call(twin, rows(WIDTH)), expected)
    assert bool(direct_bytes) is has_direct_reads(path)
