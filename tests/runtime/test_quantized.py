"""Quantized weights are streamed as they are: the same bits as without overflowml, and the model's own tensors back at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.layout import slab_bytes
from overflowml_core.runtime.component import describe_module, weight_facts
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.direct import Direct
from overflowml_core.runtime.parts import label, parts_of
from overflowml_core.runtime.structure import dissect
from tests.runtime.build import PLENTY, Job, job, raw, stack
from tests.runtime.conftest import Virtual
from tests.runtime.quantized import CONFIGS, quantized
from tests.vdevice import Faults


def model(config: str = "int8", **options: Any) -> Any:
    return quantized(stack(5, 32, hidden=64, ends=True, **options), config)


def rows() -> torch.Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Objects, classes, devices and bits of all weights."""
    return {
        name: (id(p), label(p), p.dtype, p.device, p.requires_grad, [(part.path, raw(part.tensor)) for part in parts_of(p)])
        for name, p in module.named_parameters(remove_duplicate=False)
    }


def on(device: str, vgpu: Virtual) -> Any:
    return HostDevice() if device == "cpu" else vgpu.device


def unmanaged(module: nn.Module, device: str) -> bytes:
    """What a copy of the model gives on a device that has room for all of it: kernels of different devices round differently."""
    with torch.no_grad():
        return raw(copy.deepcopy(module).to(device)(rows().to(device)))


_PLACES = [("cpu", "disk", 0), ("vgpu", "pinned", 0), ("vgpu", "pinned", 2), ("vgpu", "ram", 1), ("vgpu", "disk", 0), ("vgpu", "mixed", 0)]
"""Device, where streamed blocks wait, and how many blocks are resident."""


@pytest.mark.parametrize(
    ("config", "device", "tier", "resident"),
    [*(("int8", *place) for place in _PLACES), ("fp8", "vgpu", "pinned", 1), *((config, "cpu", "disk", 1) for config in CONFIGS)],
)
def test_output_and_tensors_are_those_of_the_unmanaged_model(
    config: str, device: str, tier: str, resident: int, tmp_path: Path, vgpu: Virtual
) -> None:
    module = model(config)
    expected, before = unmanaged(module, device), state(module)
    task = job(module, on(device, vgpu), tier=tier)
    task.budget_bytes = task.smallest_bytes + resident * max(b.slab_bytes for b in task.network.components[0].blocks)
    with task.attached(tmp_path) as engine:
        assert engine.plan.strategy == "stream"
        for _ in range(3):
            assert raw(module(rows().to(device))) == expected
        shown = {name: entry[1:3] + entry[5:] for name, entry in state(module).items()}
        assert shown == {name: entry[1:3] + entry[5:] for name, entry in before.items()}
    assert state(module) == before
    assert unmanaged(module, device) == expected


def test_slots_are_filled_and_never_rebuilt(tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    with job(module, vgpu.device).attached(tmp_path):
        seen: list[set[int]] = []
        for _ in range(4):
            used: set[int] = set()
            hooks = [
                block.up.register_forward_pre_hook(lambda inner, args, used=used: used.add(id(inner._parameters["weight"])))
                for block in module.blocks
            ]
            module(rows().to("vgpu"))
            for hook in hooks:
                hook.remove()
            seen.append(used)
        assert seen[1:] == seen[:1] * 3


def test_the_device_never_holds_more_than_the_plan_says(tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    task = job(module, vgpu.device)
    with task.attached(tmp_path) as engine:
        module(rows().to("vgpu"))
        assert engine.device.peak_bytes() <= engine.plan.estimate.device_peak_bytes == task.smallest_bytes


@pytest.mark.parametrize("device", ["cpu", "vgpu"])
def test_a_model_that_fits_keeps_its_tensors(device: str, vgpu: Virtual) -> None:
    module = model()
    expected, before = unmanaged(module, device), state(module)
    task = job(module, on(device, vgpu), budget_bytes=PLENTY)
    Direct(task.plan(), task.network, task.device).attach(task.modules, None)
    assert {name: entry[:3] + entry[5:] for name, entry in state(module).items()} == {n: e[:3] + e[5:] for n, e in before.items()}
    with torch.no_grad():
        assert raw(module(rows().to(device))) == expected


def test_a_device_without_room_gives_quantized_weights_back(vgpu: Virtual) -> None:
    module = model()
    before = state(module)
    task = job(module, vgpu.device, budget_bytes=PLENTY)
    vgpu.sim.faults = Faults(alloc={9})
    with pytest.raises(torch.OutOfMemoryError):
        Direct(task.plan(), task.network, task.device).attach(task.modules, None)
    assert state(module) == before


def test_facts_count_what_is_stored_and_what_it_stands_for() -> None:
    plain, packed = (
        describe_module(stack(5, 32, hidden=64).to(torch.bfloat16), "model"),
        describe_module(quantized(stack(5, 32, hidden=64)), "model"),
    )
    for before, after in zip(plain.blocks, packed.blocks, strict=True):
        assert (before.weight_count, before.linear_count) == (2 * 32 * 64, 2 * 32 * 64)
        assert (after.weight_count, after.linear_count) == (2 * 32 * 64, 0)
        # One byte a weight; a scale in float32 and a zero point of a byte for each row.
        assert after.stored_bytes == 2 * 32 * 64 + (64 + 32) * (4 + 1)
        assert dict(after.bytes_by_dtype) == {"I8": 2 * 32 * 64 + 96, "F32": 4 * 96}
        assert after.slab_bytes == slab_bytes([2048, 256, 64, 2048, 128, 32])
    assert packed.fingerprint != plain.fingerprint


def test_fingerprints_tell_kinds_apart_that_store_the_same() -> None:
    assert len({describe_module(model(config), "model").fingerprint for config in ("int8", "fp8", "intx")}) == 3
    assert any(fact.name == "blocks.0.up.weight (Int8Tensor).qdata" for fact in weight_facts(model()))


def test_a_cast_of_quantized_weights_is_refused(tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    with job({"model": module}, vgpu.device, tier="ram").attached(tmp_path) as engine:
        with pytest.raises(Unsupported, match=r"blocks.*Int8Tensor.*float32; "):
            engine.recast("model", torch.float32)
        assert module(rows().to("vgpu")).isfinite().all()


def test_a_weight_held_twice_is_streamed_once(tmp_path: Path) -> None:
    module = model()
    module.blocks[2].up.weight = module.blocks[1].up.weight
    expected = unmanaged(module, "cpu")
    assert len(dissect(module).fixed.weights) == 5
    task: Job = job(module, tier="disk")
    with task.attached(tmp_path):
        assert raw(module(rows())) == expected
        assert module.blocks[1].up.weight is module.blocks[2].up.weight
