"""The plan under which everything fits: weights are brought in once, and nothing is hooked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overflowml_core.errors import ReadFault
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.direct import Direct
from tests.runtime import models
from tests.runtime.build import PLENTY, job, on_meta, same, save, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.vdevice import Faults


def direct(task) -> Direct:
    plan = task.plan()
    assert plan.strategy == "direct"
    assert not plan.managed
    return Direct(plan, task.network, task.device)


def test_on_the_cpu_a_loaded_model_is_not_touched() -> None:
    module = stack(3, ends=True)
    before = snapshot(module)
    task = job(module, budget_bytes=PLENTY)
    attachment = direct(task).attach(task.modules, None)
    assert snapshot(module) == before
    attachment.detach()
    assert snapshot(module) == before


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("where", ["cpu", "vgpu"])
def test_an_unread_model_is_read_and_moved(where: str, dtype: torch.dtype | None, tmp_path: Path, vgpu: Virtual) -> None:
    module = models.llama()
    path = save(dict(module.named_parameters()), tmp_path / "model.safetensors")
    twin, loading = on_meta(module, path, dtype)
    task = job(twin, HostDevice() if where == "cpu" else vgpu.device, budget_bytes=PLENTY, loading=loading)
    direct(task).attach(task.modules, loading)
    assert {p.device.type for p in twin.parameters()} == {where}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    for p, q in zip(twin.parameters(), module.parameters(), strict=True):
        assert same(p.cpu(), q.to(p.dtype))
        assert p.requires_grad == q.requires_grad
    with torch.no_grad():
        assert twin(torch.arange(8, device=where)[None]).logits.isfinite().all()


def test_the_estimate_covers_what_is_taken(vgpu: Virtual) -> None:
    module = models.llama()
    task = job(module, vgpu.device, budget_bytes=PLENTY)
    plan = task.plan()
    attachment = direct(task).attach(task.modules, None)
    assert vgpu.peak_bytes <= plan.estimate.device_peak_bytes
    assert attachment.report().device_peak_bytes == vgpu.sim.peak_bytes


def test_a_device_that_has_less_room_than_it_said_leaves_the_modules_on_the_host(vgpu: Virtual) -> None:
    modules = {"one": stack(3, ends=True), "two": stack(4, seed=1)}
    modules["two"].register_buffer("extra", torch.ones(3))
    before = {n: snapshot(m) for n, m in modules.items()}
    task = job(modules, vgpu.device, budget_bytes=PLENTY)
    failures = 0
    for k in range(1, 100):
        vgpu.sim.faults = Faults(alloc={k})
        try:
            direct(task).attach(task.modules, None)
        except torch.OutOfMemoryError:
            failures += 1
            assert {n: snapshot(m) for n, m in modules.items()} == before, k
            continue
        break
    assert failures == 3 + 4 + 4 + 1
    assert {p.device.type for m in modules.values() for p in m.parameters()} == {"vgpu"}


def test_a_missing_file_is_a_fault(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(3)
    path = save(dict(module.named_parameters()), tmp_path / "model.safetensors")
    for device in (HostDevice(), vgpu.device):
        twin, loading = on_meta(module, path)
        task = job(twin, device, budget_bytes=PLENTY, loading=loading)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ReadFault):
            direct(task).attach(task.modules, loading)
        path.write_bytes(content)
        direct(task).attach(task.modules, loading)
        assert all(same(p.cpu(), q) for p, q in zip(twin.parameters(), module.parameters(), strict=True))
