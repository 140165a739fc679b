"""Components that take turns under one budget: whoever is called has the device, and nothing is lost on the way back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.facts import Tier
from overflowml_core.runtime.device import HostDevice
from tests.runtime import models
from tests.runtime.build import Stack, job, rows, same, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import call, on_device

TIERS = ["pinned", "ram", "disk"]


def three() -> dict[str, Stack]:
    return {
        "encoder": stack(4, 16, seed=1, ends=True),
        "transformer": stack(6, 16, seed=2, hidden=24, bias=True, ends=True),
        "decoder": stack(3, 16, seed=3, ends=True),
    }


@pytest.mark.parametrize("tier", TIERS)
def test_phases_take_turns_in_any_order_within_one_budget(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    modules = three()
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    task = job(modules, vgpu.device, reserve_bytes=4096, tier=tier)
    assert len(task.plan().phases) == 3
    with task.attached(tmp_path):
        vgpu.limit(task.smallest_bytes)
        for order in itertools.permutations(modules):
            for name in order:
                assert same(call(modules[name], rows()), expected[name])
        assert vgpu.peak_bytes <= task.smallest_bytes
    assert {name: snapshot(m) for name, m in modules.items()} == before
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_a_phase_takes_what_the_plan_says_and_leaves_nothing_behind(tmp_path: Path, vgpu: Virtual) -> None:
    modules = three()
    task = job(modules, vgpu.device)
    with task.attached(tmp_path) as engine:
        for phase in (*engine.plan.phases, *reversed(engine.plan.phases)):
            engine.enter(phase.components[0])
            assert vgpu.taken_bytes == phase.device_bytes
        engine.enter("nobody")
        assert vgpu.taken_bytes == phase.device_bytes


def test_whole_components_may_take_turns_without_a_block_streamed(tmp_path: Path, vgpu: Virtual) -> None:
    modules = three()
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    task = job(modules, vgpu.device, reserve_bytes=4096)
    task.budget_bytes = max(c.slab_bytes for c in task.network.components) + 4096
    with task.attached(tmp_path) as engine:
        assert engine.plan.strategy == "phased"
        vgpu.limit(task.budget_bytes)
        for name in ("encoder", "transformer", "transformer", "encoder", "decoder"):
            assert same(call(modules[name], rows()), expected[name])


def test_components_of_one_phase_are_on_the_device_together(tmp_path: Path, vgpu: Virtual) -> None:
    modules = {"high": stack(4, 16, seed=1, ends=True), "low": stack(4, 16, seed=2, ends=True)}
    expected = {name: on_device(m, rows()) for name, m in modules.items()}
    task = job(modules, vgpu.device, phase="denoise", reserve_bytes=4096)
    with task.attached(tmp_path) as engine:
        assert len(engine.plan.phases) == 1
        vgpu.limit(task.smallest_bytes)
        for _ in range(3):
            for name, module in modules.items():
                assert same(call(module, rows()), expected[name])


def test_the_same_component_twice_switches_nothing(tmp_path: Path, vgpu: Virtual) -> None:
    modules = three()
    with job(modules, vgpu.device).attached(tmp_path) as engine:
        call(modules["encoder"], rows())
        active, arenas = engine._turns.present, [id(a) for a in engine._phases[0]._arenas]
        call(modules["encoder"], rows())
        assert engine._turns.present is active
        assert [id(a) for a in engine._phases[0]._arenas] == arenas


@pytest.mark.parametrize("part", ["inlet", "outlet", "block"])
def test_a_part_that_is_called_by_itself_finds_its_phase(part: str, tmp_path: Path, vgpu: Virtual) -> None:
    """Pipelines call ``text_model.final_layer_norm`` or ``vae.decoder`` without the component around it."""
    modules = three()
    whole = modules["transformer"]
    module = whole.blocks[4] if part == "block" else getattr(whole, part)
    expected = on_device(module, rows())
    with job(modules, vgpu.device).attached(tmp_path):
        call(modules["encoder"], rows())
        assert same(call(module, rows()), expected)
        call(modules["decoder"], rows())
        assert same(call(module, rows()), expected)


def test_decoding_alone_finds_its_phase_once_the_host_says_so(tmp_path: Path, vgpu: Virtual) -> None:
    vae, encoder = models.autoencoder(), stack(4, 16)
    z = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        from copy import deepcopy

        expected = deepcopy(vae).to("vgpu").decode(z.to("vgpu")).sample.cpu()
        with job({"encoder": encoder, "vae": vae}, vgpu.device, reserve_bytes=2**20).attached(tmp_path) as engine:
            for _ in range(2):
                call(encoder, rows())
                engine.enter("vae")
                assert same(vae.decode(z.to("vgpu")).sample.cpu(), expected)


class Counting(nn.Module):
    """Writes to its buffers: in place, by assignment, and with another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stack(2, 16).blocks)
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(1), persistent=False)
        self.register_buffer("history", torch.zeros(0, 16))
        self.register_buffer("untouched", torch.randn(3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        self.calls += 1
        self.assigned = self.assigned + 1
        self.history = torch.cat([self.history, x[:1]])
        return x + self.calls[0]


@pytest.mark.parametrize("where", ["host", "device"])
def test_what_a_model_writes_to_its_buffers_survives_the_switch(where: str, tmp_path: Path, vgpu: Virtual) -> None:
    device = HostDevice() if where == "host" else vgpu.device
    target = device.torch_device
    modules = {"counting": Counting(), "other": stack(4, 16)}
    plain = Counting()
    x = rows()
    with torch.no_grad(), job(modules, device, reserve_bytes=8192).attached(tmp_path):
        for _ in range(3):
            assert torch.allclose(modules["counting"](x.to(target)).cpu(), plain(x))
            modules["other"](x.to(target))
        assert modules["counting"].calls.tolist() == [3, 3]
        modules["counting"](x.to(target))
    plain(x)
    for name, buffer in plain.named_buffers():
        found = getattr(modules["counting"], name)
        assert found.device.type == "cpu", name
        assert torch.allclose(found, buffer), name
    assert list(modules["counting"].state_dict()) == list(plain.state_dict())


def test_a_buffer_that_two_modules_share_stays_one(tmp_path: Path, vgpu: Virtual) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(stack(3, 16).blocks)
            self.register_buffer("count", torch.zeros(1))
            self.reader = nn.Module()
            self.reader.register_buffer("count", self.count)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            for block in self.blocks:
                x = block(x)
            return x * self.reader.count

    module = Sharing()
    before = module.count
    with torch.no_grad(), job({"model": module, "other": stack(3, 16)}, vgpu.device, reserve_bytes=4096).attached(tmp_path) as engine:
        for step in (1, 2, 3):
            module(rows().to("vgpu"))
            assert module.reader.count.item() == step
            engine.enter("other")
    assert module.count is module.reader.count is before
    assert module.count.item() == 3


def test_residents_of_a_phase_wait_where_the_plan_says(tmp_path: Path, vgpu: Virtual) -> None:
    modules = three()
    for tier in TIERS:
        task = job(modules, vgpu.device, tier=tier, budget_bytes=slots_budget(modules["transformer"], 2, 2))
        with task.attached(tmp_path) as engine:
            homes = {h.home.tier for h in engine._held if h.slab.nbytes}
            assert Tier.DEVICE not in homes
            assert Tier(tier) in homes
            call(modules["transformer"], rows())
            engine.enter("encoder")
            assert all(p.device.type == "cpu" for p in modules["transformer"].parameters())


def test_on_the_cpu_phases_take_turns_too(tmp_path: Path) -> None:
    modules = three()
    expected = {name: m(rows()) for name, m in modules.items()}
    before = {name: snapshot(m) for name, m in modules.items()}
    task = job(modules)
    with task.attached(tmp_path) as engine:
        for name in ("decoder", "encoder", "transformer", "transformer", "decoder"):
            assert same(modules[name](rows()), expected[name])
        assert engine.device.arenas.peak_bytes <= task.smallest_bytes
    assert {name: snapshot(m) for name, m in modules.items()} == before


def unequal_turns(vgpu: Virtual) -> tuple[dict[str, Stack], list[float]]:
    """Two components of which each fits whole, and a clock on which a block's copy and its product take a millisecond each."""
    width, count = 64, 32
    nbytes, flop = width * width * 4, 2 * count * width * width
    vgpu.reset(h2d_bytes_per_s=nbytes / 1e-3, flop_per_s=flop / 1e-3, memory_bytes_per_s=1e30)
    return {name: stack(6, width, seed=seed) for seed, name in enumerate(("one", "other"))}, [width, count]


def test_a_phase_computes_while_its_residents_come_in(tmp_path: Path, vgpu: Virtual) -> None:
    modules, (width, count) = unequal_turns(vgpu)
    task = job(modules, vgpu.device)
    task.budget_bytes = max(c.slab_bytes for c in task.network.components)
    with task.attached(tmp_path) as engine:
        assert engine.plan.strategy == "phased"
        x = torch.zeros(count, width, device="vgpu")
        modules["one"](x)
        vgpu.sim.synchronize()
        for name in ("other", "one", "other"):
            began, host = vgpu.sim.elapsed(), vgpu.sim.clock.host_s
            modules[name](x)
            assert vgpu.sim.clock.host_s == host  # the host goes on at once
            # One copy that nothing hides, then a product a millisecond: 7, where 12 would be one after the other.
            assert vgpu.sim.clock.streams[0].time_s - began == pytest.approx(7e-3)
            vgpu.sim.synchronize()


def test_a_resident_shows_its_home_until_it_has_arrived(tmp_path: Path, vgpu: Virtual) -> None:
    modules, (width, count) = unequal_turns(vgpu)
    task = job(modules, vgpu.device)
    task.budget_bytes = max(c.slab_bytes for c in task.network.components)
    expected = on_device(modules["other"], torch.ones(count, width))
    with task.attached(tmp_path) as engine:
        engine.enter("other")
        blocks = modules["other"].blocks
        assert {block.up.weight.device.type for block in blocks} == {"cpu"}
        call(blocks[2], torch.ones(count, width))
        assert [block.up.weight.device.type for block in blocks] == ["cpu", "cpu", "vgpu", "cpu", "cpu", "cpu"]
        for _ in range(2):
            assert same(call(modules["other"], torch.ones(count, width)), expected)
        assert {block.up.weight.device.type for block in blocks} == {"vgpu"}
        assert not any(block._forward_hooks for block in blocks)
        engine.enter("one")
        engine.enter("other")
        assert same(call(modules["other"], torch.ones(count, width)), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for module in modules.values() for m in module.modules())
