"""Streaming to an accelerator: right under every budget, never a byte over it, and no two uses of a slot out of order."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from overflowml_core.facts import Tier
from tests.runtime import models
from tests.runtime.build import Job, Stack, job, on_meta, rows, same, save, settled, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual

TIERS = ["pinned", "ram", "disk"]
ROW_BYTES = 3 * 16 * 4


def on_device(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What the module computes when all of it is on the device."""
    twin = copy.deepcopy(module).to("vgpu")
    with torch.no_grad():
        return twin(*(a.to("vgpu") for a in args)).cpu()


def call(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(*(a.to("vgpu") for a in args)).cpu()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("slots", "resident"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_output_is_that_of_the_whole_model_at_every_budget(tier: str, slots: int, resident: int, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16, hidden=24, bias=True, ends=True)
    expected, before = on_device(module, rows()), snapshot(module)
    activations = 16 * ROW_BYTES
    budget = slots_budget(module, slots, resident) + activations
    engine = job(module, vgpu.device, budget_bytes=budget, reserve_bytes=activations, tier=tier).attach(tmp_path)
    vgpu.limit(budget)
    for _ in range(3):
        assert same(call(module, rows()), expected)
    assert {p.home for p in engine.plan.phases[0].streamed} == {Tier(tier)}
    assert vgpu.peak_bytes <= engine.plan.estimate.device_peak_bytes <= budget
    assert engine.report().device_peak_bytes - vgpu.base_bytes <= engine.plan.estimate.device_peak_bytes
    engine.detach()
    assert snapshot(module) == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_attaching_stays_within_the_plan_too(tmp_path: Path, vgpu: Virtual) -> None:
    """Loading goes through RAM piece by piece: the device never holds more than when it runs."""
    module = stack(6, 16, bias=True, ends=True)
    budget = slots_budget(module, 2, 2)
    vgpu.limit(budget)
    engine = job(module, vgpu.device, budget_bytes=budget).attach(tmp_path)
    assert vgpu.peak_bytes == vgpu.taken_bytes == budget == engine.plan.estimate.device_peak_bytes
    engine.detach()


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_host_memory_is_what_the_plan_says(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16, bias=True)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1), tier=tier).attach(tmp_path)
    call(module, rows())
    estimate = engine.plan.estimate
    assert vgpu.pinned_bytes == engine.device.pinned.held_bytes == engine.report().pinned_bytes == estimate.pinned_bytes
    assert engine.report().disk_bytes == estimate.disk_bytes
    assert engine.report().ram_bytes == estimate.ram_bytes == 0
    engine.detach()


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], str, float, bool, list[int]]:
    hidden = draw(st.lists(st.sampled_from([8, 8, 24, 40]), min_size=2, max_size=7))
    order = draw(st.lists(st.integers(0, len(hidden) - 1), min_size=1, max_size=8))
    return hidden, draw(st.sampled_from([*TIERS, "mixed"])), draw(st.floats(0, 1)), draw(st.booleans()), order


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_any_stack_any_budget_any_order(tmp_path: Path, vgpu: Virtual, case: tuple[list[int], str, float, bool, list[int]]) -> None:
    hidden, tier, share, unread, order = case
    vgpu.reset()
    plain = Stack(0, 16, ends=True).requires_grad_(False)
    plain.blocks = nn.ModuleList(stack(1, 16, seed=i, hidden=h).blocks[0] for i, h in enumerate(hidden))
    expected = on_device(plain, rows())
    plain.order = order
    jumped = on_device(plain, rows())
    plain.order = None
    target, loading = copy.deepcopy(plain), None
    if unread:
        target, loading = on_meta(plain, save(dict(plain.named_parameters()), tmp_path / "model.safetensors"))
    task = Job({"model": target}, vgpu.device, reserve_bytes=16 * 3 * 40 * 4, tier=tier, loading=loading)
    task.budget_bytes = int(task.smallest_bytes + share * (task.whole_bytes - 1 - task.smallest_bytes))
    with task.attached(tmp_path):
        vgpu.limit(task.budget_bytes)
        for wanted, right in ((None, expected), (order, jumped), (order, jumped), (None, expected)):
            target.order = wanted
            assert same(call(target, rows()), right)
        assert vgpu.peak_bytes <= task.budget_bytes
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


@pytest.mark.parametrize("tier", ["pinned", "disk"])
@pytest.mark.parametrize("name", ["llama", "t5", "clip", "flux", "unet", "vae"])
def test_real_models_compute_the_same_when_streamed(name: str, tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    build = {
        "llama": models.llama, "t5": lambda: models.t5(encoder_only=False), "clip": models.clip_text,
        "flux": models.flux_transformer, "unet": models.sdxl_unet, "vae": models.autoencoder,
    }[name]  # fmt: skip
    module = build()
    whole = copy.deepcopy(module).to("vgpu")
    expected = run(whole)
    del whole
    before = snapshot(module)
    task = job(module, vgpu.device, reserve_bytes=2**21, tier=tier)
    task.budget_bytes = (task.smallest_bytes + task.whole_bytes) // 2
    engine = task.attach(tmp_path)
    vgpu.limit(task.budget_bytes)
    for _ in range(3):
        assert same(run(module), expected)
    engine.detach()
    assert snapshot(module) == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def run(module: nn.Module) -> torch.Tensor:
    kind, ids = type(module).__name__, torch.arange(3, 19, device="vgpu")[None]
    with torch.no_grad():
        if kind == "FluxTransformer2DModel":
            return module(**{n: x.to("vgpu") for n, x in models.flux_inputs().items()}).sample.cpu()
        if kind == "UNet2DConditionModel":
            torch.manual_seed(2)
            return module(torch.randn(1, 4, 8, 8).to("vgpu"), 3, torch.randn(1, 5, 32).to("vgpu")).sample.cpu()
        if kind == "AutoencoderKL":
            return module(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to("vgpu")).sample.cpu()
        if kind == "T5ForConditionalGeneration":
            return module(input_ids=ids, decoder_input_ids=ids).logits.cpu()
        return module(ids)[0].cpu()


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_a_pass_allocates_nothing_but_what_the_models_operators_do(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1), tier=tier).attach(tmp_path)
    x = rows().to("vgpu")
    module(x)
    settled(engine)
    vgpu.reset()
    module(x)
    assert vgpu.sim.allocation_count == 6 * 2  # one product and one sum a block
    assert vgpu.sim.allocated_bytes <= vgpu.sim.peak_bytes <= vgpu.base_bytes + slots_budget(module, 2, 1) + 4 * 512
    engine.detach()


@pytest.mark.parametrize("count", [5, 6])
def test_a_pass_neither_allocates_nor_synchronizes(count: int, tmp_path: Path, vgpu: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the first block of a pass to the end of its last, once every block has been in its slots."""
    module = stack(count, 16)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attach(tmp_path)
    x, calls = rows().to("vgpu"), []
    for owner, name in ((vgpu.sim, "charge"), (vgpu.sim, "charge_pinned"), (vgpu.sim, "synchronize"), (vgpu.sim.clock, "synchronize")):
        true = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, true=true, name=name: (calls.append(name), true(*a))[1])
    for number in range(4):
        calls.clear()
        module(x)
        if number >= 2:
            assert calls == ["charge"] * 2 * count  # one product and one sum a block, the model's own
    vgpu.sim.synchronize()
    assert "synchronize" in calls  # they are counted
    monkeypatch.undo()
    engine.detach()


def test_a_pass_from_pinned_memory_never_makes_the_host_wait(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 16)
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attach(tmp_path)
    x = rows().to("vgpu")
    vgpu.reset(h2d_bytes_per_s=1e6)
    before = vgpu.sim.clock.host_s
    for _ in range(3):
        y = module(x)
    assert vgpu.sim.clock.host_s == before
    assert vgpu.sim.elapsed() > 16e-3  # while the device has a lot to do
    assert same(y.cpu(), module(x).cpu())
    engine.detach()


def test_addresses_of_weights_are_the_same_in_every_pass(tmp_path: Path, vgpu: Virtual) -> None:
    """What compiled graphs captured stays valid."""
    module, seen = stack(5, 16), []
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 1)).attach(tmp_path)
    for block in module.blocks:
        block.register_forward_pre_hook(lambda m, _: seen.append((id(m.up.weight), m.up.weight.data_ptr())))
    for _ in range(3):
        call(module, rows())
    assert seen[:5] == seen[5:10] == seen[10:]
    assert len({address for _, address in seen}) == 3  # two slots and one resident
    engine.detach()


def test_streamed_weights_are_seen_at_home_outside_their_block(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(4, 16)
    truth = {n: t.clone() for n, t in module.state_dict().items()}
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attach(tmp_path)
    where = []
    module.blocks[1].register_forward_pre_hook(lambda *_: where.append([b.up.weight.device.type for b in module.blocks]))
    call(module, rows())
    assert where == [["cpu", "vgpu", "cpu", "cpu"]]
    assert all(same(t, truth[n]) and t.device.type == "cpu" for n, t in module.state_dict().items())
    engine.detach()


def test_inference_mode_and_normal_mode_may_take_turns(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(5, 16, ends=True)
    expected = on_device(module, rows())
    with torch.inference_mode():
        engine = job(module, vgpu.device).attach(tmp_path)
        assert same(module(rows().to("vgpu")).cpu(), expected)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert same(module(rows().to("vgpu")).cpu(), expected)
    with torch.inference_mode():
        assert same(module(rows().to("vgpu")).cpu(), expected)
        engine.detach()
    assert not any(p.is_inference() for p in module.parameters())


def test_a_model_that_is_too_large_for_the_device_runs_on_it(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(20, 32)
    expected = module(rows(32))
    vgpu.limit(4 * 32 * 32 * 4)
    with pytest.raises(torch.OutOfMemoryError):
        copy.deepcopy(module).to("vgpu")
    engine = job(module, vgpu.device, budget_bytes=slots_budget(module, 2)).attach(tmp_path)
    assert same(call(module, rows(32)), expected)
    engine.detach()
