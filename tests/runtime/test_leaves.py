"""Blocks that no budget holds whole are streamed by their innermost modules, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Tier
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import Device, HostDevice
from overflowml_core.runtime.leaves import leaf_units, taken_apart
from overflowml_core.runtime.structure import dissect
from tests.runtime import models
from tests.runtime.build import Stack, job, on_meta, rows, same, save, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_host_engine import run


class Scaled(nn.Module):
    """A block with a weight of its own beside its layers, as diffusers' modulation tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 1.5))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return x + self.layers(y * self.scale)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tower() -> Tower:
    torch.manual_seed(1)
    return Tower().eval().requires_grad_(False)


def test_attention_that_reads_its_layers_is_one_leaf() -> None:
    block = dissect(tower()).blocks[0]
    assert [unit.name for unit in leaf_units(block)] == ["blocks.0.attention", "blocks.0.layers.0", "blocks.0.layers.2"]


def test_the_described_leaves_are_those_that_are_streamed() -> None:
    module = tower()
    described = describe_module(module, "model").blocks[0]
    assert [(leaf.name, leaf.slab_bytes) for leaf in described.leaves] == [
        (unit.name, unit.slab_bytes) for unit in leaf_units(dissect(module).blocks[0])
    ]
    assert described.slab_bytes - sum(leaf.slab_bytes for leaf in described.leaves) == 512  # the scale, aligned


def test_weights_around_the_leaves_are_fixed() -> None:
    structure = dissect(tower())
    names = [leaf.name for unit in structure.blocks for leaf in leaf_units(unit)]
    apart = taken_apart(structure, names)
    assert [unit.name for unit in apart.blocks] == names
    assert [weight.name for weight in apart.fixed.weights] == ["blocks.0.scale", "blocks.1.scale", "blocks.2.scale"]
    assert sum(unit.slab_bytes for unit in apart.units) == sum(unit.slab_bytes for unit in structure.units)


def runs_by_its_leaves(module: nn.Module, device: Device, folder: Path) -> None:
    x = rows() if isinstance(module, Stack) else rows()[None]
    expected, before = module(x), snapshot(module)
    task = job(module, device)
    task.budget_bytes = task.smallest_bytes
    blocks = task.network.components[0].blocks
    assert task.budget_bytes < task.network.components[0].resident_bytes + blocks[0].slab_bytes
    with task.attached(folder) as engine:
        assert {place.block.count(".") for place in engine.plan.placements()} != {1}
        for _ in range(3):
            assert torch.allclose(module(x.to(device.torch_device)).cpu(), expected, atol=1e-6)
        assert engine.device.arenas.peak_bytes <= task.budget_bytes
    assert snapshot(module) == before


MAKERS = pytest.mark.parametrize("make", [tower, lambda: stack(4, hidden=48, bias=True, ends=True)], ids=["tower", "stack"])


@MAKERS
def test_a_block_larger_than_the_budget_runs_by_its_leaves(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    runs_by_its_leaves(make(), HostDevice(), tmp_path)


def test_an_accelerator_streams_leaves(tmp_path: Path, vgpu: Virtual) -> None:
    runs_by_its_leaves(stack(4, hidden=48, bias=True, ends=True), vgpu.device, tmp_path)


@pytest.mark.parametrize("name", ["llama", "flux", "t5"])
def test_real_classes_run_by_their_leaves_from_their_files(name: str, tmp_path: Path) -> None:
    build = {"llama": models.llama, "flux": models.flux_transformer, "t5": lambda: models.t5(encoder_only=False)}[name]
    module = build()
    expected = run(module)
    twin, loading = on_meta(module, save(dict(module.named_parameters()), tmp_path / "model.safetensors"))
    task = job(twin, loading=loading)
    engine = task.attach(tmp_path / "store")
    assert any(place.tier is Tier.DISK for place in engine.plan.placements())
    assert any("innermost modules" in reason for reason in engine.plan.reasons)
    for _ in range(2):
        assert same(run(twin), expected)
    engine.detach()
    assert same(run(twin), expected)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_blocks_taken_apart_run_uncompiled_until_they_are_given_back(compiled_first: bool, tmp_path: Path) -> None:
    """No graph holds the waiting for each leaf; with ``fullgraph`` that would be an error of the compiler."""
    torch._dynamo.reset()
    module = stack(2, hidden=48, bias=True, ends=True)
    expected, block = run(module), module.blocks[0]

    def compile_blocks() -> None:
        for inner in module.blocks:
            inner.compile(backend="eager", fullgraph=True)

    if compiled_first:
        compile_blocks()
    with job(module).attached(tmp_path):
        if not compiled_first:
            compile_blocks()
        assert block._compiled_call_impl is None
        assert same(run(module), expected)
    assert block._compiled_call_impl is not None
    assert "compile" not in vars(block)
    counters.clear()
    assert same(run(module), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_single_weight_that_is_too_large_is_named(tmp_path: Path) -> None:
    task = job(stack(4, hidden=48))
    task.budget_bytes = task.smallest_bytes - 1
    with pytest.raises(DoesNotFit, match=r"blocks\.\d\.(up|down)"):
        task.attach(tmp_path)
