"""Adapters that arrive after the attachment, on the host and on a virtual accelerator: where they are, what they count for, what folding
them into the weights does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from overflowml_core.errors import DoesNotFit, Unsupported
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device, HostDevice
from tests.runtime.build import Job, Stack, job, on_meta, rows, same, save, slots_budget, stack
from tests.runtime.conftest import Virtual

PLACES = [("host", "disk"), ("host", "file"), ("virtual", "pinned"), ("virtual", "file")]
"""Where it computes, and where streamed blocks wait; "file" is the model's own, "disk" the packed store."""
WIDTH = 16
RESERVE_BYTES = 8 * 8192
"""An eighth of it is for guests: two sets of adapters."""
ADAPTER_BYTES = 4 * 2 * (5 * (WIDTH + 48) + 2 * WIDTH)


def add_lora(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Adapters for every matrix, with random weights that tell them apart."""
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["up", "inlet"], init_lora_weights=False), model, name)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=random))


def tuners(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def plain() -> Stack:
    return stack(5, WIDTH, hidden=48, bias=True, ends=True)


class Bench:
    """A managed stack beside one that is not, and what both give on their device."""

    def __init__(self, device: Device, tier: str, folder: Path, residents: int = 1) -> None:
        self.device = device
        self.theirs = plain()
        self.ours: nn.Module = plain()
        loading = None
        if tier == "file":
            self.ours, loading = on_meta(self.ours, save(self.ours.state_dict(), folder / "model.safetensors"))
        budget = slots_budget(self.theirs, 2, residents) + RESERVE_BYTES
        where = "disk" if tier == "file" else tier
        self.task = Job({"model": self.ours}, device, budget, RESERVE_BYTES, where, loading=loading)
        self.engine = self.task.attach(folder)

    def check(self, passes: int = 1) -> None:
        """Passes of both give the same bits."""
        theirs = self.theirs.to(self.device.torch_device)
        with torch.no_grad():
            expected = theirs(rows(WIDTH).to(self.device.torch_device))
            for _ in range(passes):
                assert same(self.ours(rows(WIDTH).to(self.device.torch_device)), expected)
        self.theirs.to("cpu")

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.theirs


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    return HostDevice() if request.param == "host" else request.getfixturevalue("vgpu").device


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On matrices this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def bench(device: Device, tier: str, folder: Path, residents: int = 1) -> Iterator[Bench]:
    made = Bench(device, tier, folder, residents)
    try:
        yield made
    finally:
        made.engine.detach()


@pytest.mark.parametrize(("device", "tier"), PLACES, indirect=["device"])
def test_adapters_come_and_go(tier: str, device: Device, tmp_path: Path) -> None:
    with bench(device, tier, tmp_path) as b:
        streamed = [p for p in b.engine.plan.placements() if p.tier is not Tier.DEVICE]
        assert 0 < len(streamed) < 5
        b.check()
        for model in b.both():
            add_lora(model, "a", 3)
        b.check(2)
        for model in b.both():
            add_lora(model, "b", 4)
            for layer in tuners(model):
                layer.set_adapter(["a", "b"])
                layer.set_scale("b", 0.5)
        b.check()
        for model in b.both():
            for layer in tuners(model):
                layer.delete_adapter("a")
        b.check()
        for model in b.both():
            for path, module in list(model.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, module.get_base_layer())
        assert not tuners(b.ours)
        b.check()
    assert all(same(mine, theirs) for mine, theirs in zip(b.ours.parameters(), b.theirs.parameters(), strict=True))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("device", "tier"), PLACES, indirect=["device"])
def test_folded_adapters_are_streamed_and_taken_out_again(tier: str, safe: bool, device: Device, tmp_path: Path) -> None:
    with bench(device, tier, tmp_path) as b:
        for model in b.both():
            add_lora(model)
        for method in ("merge", "unmerge", "merge"):
            for model in b.both():
                for layer in tuners(model):
                    with torch.no_grad():
                        layer.merge(safe_merge=safe) if method == "merge" else layer.unmerge()
            b.check()
            state, expected = b.ours.state_dict(), b.theirs.state_dict()
            assert all(same(state[name], expected[name]) for name in expected)
    assert all(same(mine, theirs) for mine, theirs in zip(b.ours.parameters(), b.theirs.parameters(), strict=True))
    assert all(parameter.device.type == "cpu" for parameter in b.ours.parameters())
    assert all("merge" not in vars(layer) for layer in tuners(b.ours))


def test_guests_follow_their_phase_and_leave_no_memory_behind(tmp_path: Path, vgpu: Virtual) -> None:
    modules = {"first": plain(), "second": plain()}
    task = job(modules, vgpu.device)
    # Whole blocks, the guests of one phase, and no more.
    task.budget_bytes = slots_budget(modules["first"], 1) + ADAPTER_BYTES
    x = rows(WIDTH).to("vgpu")
    with task.attached(tmp_path) as engine, torch.no_grad():
        add_lora(modules["first"])
        guests = [p for path, p in modules["first"].named_parameters() if "lora_" in path]
        for name, where in (("first", "vgpu"), ("second", "cpu"), ("first", "vgpu")):
            modules[name](x)
            assert {p.device.type for p in guests} == {where}
        engine.enter("second")
        assert vgpu.taken_bytes - x.untyped_storage().nbytes() <= engine.plan.budget.device_bytes
    del x, guests, modules, task, engine
    assert vgpu.taken_bytes <= 512


def test_staging_slots_make_room_where_no_block_is_resident(tmp_path: Path, vgpu: Virtual) -> None:
    model, theirs = plain(), plain().to("vgpu")
    task = job(model, vgpu.device, budget_bytes=slots_budget(model, 2))
    plan = task.plan()
    (phase,) = plan.phases
    streamed = tuple(replace(p, tier=Tier.PINNED, home=Tier.PINNED) for p in phase.placements)
    two_slots = replace(phase, placements=streamed, staging_bytes=2 * max(p.stored_bytes for p in streamed))
    assert two_slots.device_bytes == task.budget_bytes
    engine = task.engine(tmp_path, replace(plan, phases=(two_slots,))).attach(task.modules, None)
    with torch.no_grad():
        for each in (model, theirs):
            add_lora(each)
        assert same(model(rows(WIDTH).to("vgpu")), theirs(rows(WIDTH).to("vgpu")))
        assert engine.plan.phases[0].slot_count == 1
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module.get_base_layer())
        model(rows(WIDTH).to("vgpu"))
        assert engine.plan.phases[0].slot_count == 2
    engine.detach()


@pytest.mark.parametrize("room_bytes", [0, 600])
def test_adapters_that_do_not_fit_are_refused_until_they_are_gone(room_bytes: int, tmp_path: Path) -> None:
    model, theirs = plain(), plain()
    task = job(model)
    task.budget_bytes = task.smallest_bytes + room_bytes
    with task.attached(tmp_path), torch.no_grad():
        add_lora(model)
        for _ in range(2):
            with pytest.raises(DoesNotFit, match=r"adapters .* take 2816 bytes.*overflow='") as refusal:
                model(rows(WIDTH))
        assert refusal.value.near_misses[0].short_bytes == ADAPTER_BYTES - room_bytes
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module.get_base_layer())
        assert same(model(rows(WIDTH)), theirs(rows(WIDTH)))


@pytest.mark.parametrize(("device", "tier"), PLACES, indirect=["device"])
def test_edits_within_the_context_are_streamed(tier: str, device: Device, tmp_path: Path) -> None:
    with bench(device, tier, tmp_path) as b:
        b.check()
        for k in range(5):
            with torch.no_grad():
                with b.engine.editing(b.ours.blocks[k]):
                    b.ours.blocks[k].up.weight.data.mul_(1.5)
                b.theirs.blocks[k].up.weight.data.mul_(1.5)
        b.check()
    assert all(same(mine, theirs) for mine, theirs in zip(b.ours.parameters(), b.theirs.parameters(), strict=True))


@pytest.mark.parametrize(("device", "tier"), PLACES, indirect=["device"])
def test_streamed_weights_that_are_replaced_or_edited_without_notice_are_seen(tier: str, device: Device, tmp_path: Path) -> None:
    with bench(device, tier, tmp_path, residents=0) as b:
        b.check()
        with torch.no_grad():
            for model in b.both():
                model.blocks[1].up.weight.data = model.blocks[1].up.weight.data.neg()
                model.blocks[2].up.weight.mul_(0.5)
                model.blocks[3].up.weight = nn.Parameter(torch.eye(48, WIDTH))
        b.check()
        assert same(b.ours.state_dict()["blocks.3.up.weight"].cpu(), torch.eye(48, WIDTH))
    assert all(same(mine, theirs) for mine, theirs in zip(b.ours.parameters(), b.theirs.parameters(), strict=True))


@pytest.mark.parametrize("device", ["host", "virtual"], indirect=True)
def test_a_wider_matrix_takes_the_place_of_the_plans(device: Device, tmp_path: Path) -> None:
    """As resize_token_embeddings does it: the old parameter object gets data of another shape."""
    with bench(device, "pinned", tmp_path) as b:
        for model in b.both():
            wider = nn.Linear(WIDTH, WIDTH + 1)
            with torch.no_grad():
                wider.weight.copy_(torch.arange(WIDTH * (WIDTH + 1)).view(WIDTH + 1, WIDTH))
            model.inlet.weight.data = wider.weight.data[:WIDTH, 1:].to(model.inlet.weight.device)
            model.inlet.weight = model.inlet.weight
            model.inlet = nn.Sequential(nn.Linear(WIDTH, WIDTH + 1, bias=False), nn.Linear(WIDTH + 1, WIDTH, bias=False))
            with torch.no_grad():
                for parameter in model.inlet.parameters():
                    parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 100)
        b.check()


def test_a_module_in_training_mode_is_refused_where_gradients_are_on(tmp_path: Path) -> None:
    model = plain()
    with job(model).attached(tmp_path):
        model.train()
        with pytest.raises(Unsupported, match=r"training mode.*model\.eval\(\).*overflowml\.release"):
            model(rows(WIDTH))
        with torch.no_grad():
            model(rows(WIDTH))
        model.eval()
        assert not model(rows(WIDTH)).requires_grad
