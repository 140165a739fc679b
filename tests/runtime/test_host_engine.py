"""The engine on a machine without an accelerator: RAM under a budget computes, the disk holds the rest."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.errors import PlanMismatch, ReadFault
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import HostDevice
from tests.runtime import models
from tests.runtime.build import Stack, in_threads, job, on_meta, raw, rows, same, save, slots_budget, snapshot, stack

IDS = torch.arange(3, 19)[None]


def run(module: nn.Module) -> torch.Tensor:
    if isinstance(module, Stack):
        return module(rows())
    kind = type(module).__name__
    with torch.no_grad():
        if kind == "FluxTransformer2DModel":
            return module(**models.flux_inputs()).sample
        if kind == "UNet2DConditionModel":
            torch.manual_seed(2)
            return module(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32)).sample
        if kind == "AutoencoderKL":
            return module(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))).sample
        if kind == "T5ForConditionalGeneration":
            return module(input_ids=IDS, decoder_input_ids=IDS).logits
        return module(IDS)[0]


BUILDERS = {
    "stack": lambda: stack(5, ends=True, bias=True),
    "llama": models.llama,
    "t5": lambda: models.t5(encoder_only=False),
    "clip": models.clip_text,
    "flux": models.flux_transformer,
    "unet": models.sdxl_unet,
    "vae": models.autoencoder,
}


def unread(module: nn.Module, folder: Path, dtype: torch.dtype | None = None):
    path = save(dict(module.named_parameters()), folder / "model.safetensors")
    return on_meta(module, path, dtype)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_loaded_model_computes_the_same_under_any_budget_and_is_given_back(name: str, share: float, tmp_path: Path) -> None:
    module = BUILDERS[name]()
    expected, before = run(module), snapshot(module)
    task = job(module)
    task.budget_bytes = int(task.smallest_bytes + share * (task.whole_bytes - 1 - task.smallest_bytes))
    engine = task.attach(tmp_path)
    assert engine.plan.strategy == "stream"
    for _ in range(3):
        assert same(run(module), expected)
    assert engine.device.arenas.peak_bytes <= task.budget_bytes
    engine.detach()
    assert snapshot(module) == before
    assert same(run(module), expected)
    assert engine.device.arenas.held_bytes == 0


@pytest.mark.parametrize("name", BUILDERS)
def test_an_unread_model_is_streamed_from_its_own_file(name: str, tmp_path: Path) -> None:
    module = BUILDERS[name]()
    expected = run(module)
    twin, loading = unread(module, tmp_path)
    engine = job(twin, loading=loading).attach(tmp_path / "store")
    assert not (tmp_path / "store").exists()  # nothing had to be packed
    for _ in range(2):
        assert same(run(twin), expected)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), module.parameters(), strict=True))
    engine.detach()
    assert same(run(twin), expected)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]


def test_arenas_take_exactly_what_the_plan_says(tmp_path: Path) -> None:
    for slots, resident in ((1, 0), (2, 0), (2, 1), (2, 3)):
        module = stack(6, ends=True, bias=True)
        engine = job(module, budget_bytes=slots_budget(module, slots, resident)).attach(tmp_path)
        phase = engine.plan.phases[0]
        assert (phase.slot_count, len(phase.streamed)) == (slots, 6 - resident)
        run(module)
        assert engine.device.arenas.peak_bytes == engine.device.arenas.held_bytes == phase.device_bytes
        assert engine.report().device_peak_bytes == engine.plan.estimate.device_peak_bytes
        engine.detach()


def test_weights_in_another_dtype_are_packed(tmp_path: Path) -> None:
    module = stack(4, ends=True)
    expected = run(copy.deepcopy(module).bfloat16().float())  # rounded to what the file holds
    twin, loading = unread(module.bfloat16(), tmp_path, torch.float32)
    engine = job(twin, loading=loading).attach(tmp_path / "store")
    assert engine._store is not None
    assert engine._store.nbytes == sum(p.stored_bytes for p in engine.plan.phases[0].streamed)
    assert same(run(twin), expected)
    assert all(torch.equal(p, q.float()) for p, q in zip(twin.parameters(), module.parameters(), strict=True))
    engine.detach()
    assert same(run(twin), expected)


def test_detaching_gives_weights_back_that_no_longer_need_the_file(tmp_path: Path) -> None:
    """A cast model owns its weights afterwards; one that is used as stored stays mapped to its file."""
    module = stack(4).half()
    twin, loading = unread(module, tmp_path, torch.float32)
    job(twin, loading=loading).attach(tmp_path / "store").detach()
    os.truncate(tmp_path / "model.safetensors", 0)
    assert all(torch.equal(p, q.float()) for p, q in zip(twin.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["as stored", "packed"])
def test_writing_to_a_managed_weight_does_not_change_the_file(dtype: torch.dtype | None, tmp_path: Path) -> None:
    module = stack(4, ends=True)
    twin, loading = unread(module, tmp_path, dtype)
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    engine = job(twin, loading=loading).attach(tmp_path / "store")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    engine.detach()
    assert path.read_bytes() == before


def test_state_dict_of_a_managed_model_has_the_true_weights_between_and_after_passes(tmp_path: Path) -> None:
    module = stack(5, ends=True, bias=True)
    truth = {name: raw(t) for name, t in module.state_dict().items()}
    engine = job(module, budget_bytes=slots_budget(module, 2, 1)).attach(tmp_path)
    for _ in range(2):
        assert {name: raw(t) for name, t in module.state_dict().items()} == truth
        run(module)
    engine.detach()


def test_a_managed_model_can_be_saved_in_the_middle_of_its_use(tmp_path: Path) -> None:
    module = models.llama()
    truth = {name: raw(t) for name, t in module.state_dict().items()}
    engine = job(module).attach(tmp_path / "store")
    run(module)
    module.save_pretrained(tmp_path / "saved")
    engine.detach()
    loaded = type(module).from_pretrained(tmp_path / "saved")
    assert {name: raw(t) for name, t in loaded.state_dict().items()} == truth


def test_odd_weights_survive_being_managed(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last)
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.nothing = nn.Parameter(torch.empty(0, 3))
            self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
            self.table = nn.Parameter(torch.arange(5), requires_grad=False)
            self.small = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
            self.turned = nn.Parameter(torch.randn(3, 2).t())
            self.missing = None
            self.register_parameter("none", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            extra = self.turned.sum() + self.small.float().sum() + self.nothing.sum() + self.table.sum()
            return self.conv(x) * self.scale + torch.where(self.mask, extra, 0.0).sum()

    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList(Odd() for _ in range(3))
    module.forward = lambda x: module.blocks[2](module.blocks[1](module.blocks[0](x)))
    x = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        expected, before = module(x), snapshot(module)
        engine = job(module).attach(tmp_path)
        for _ in range(2):
            assert same(module(x), expected)
        assert module.blocks[0].conv.weight.stride() == before["blocks.0.conv.weight"][6]
        engine.detach()
    assert snapshot(module) == before


def test_gradients_can_be_computed_after_detaching_what_inference_mode_ran(tmp_path: Path) -> None:
    module = stack(3, ends=True).requires_grad_(True)
    with torch.inference_mode():
        engine = job(module).attach(tmp_path)
        run(module)
        engine.detach()
    assert not any(p.is_inference() for p in module.parameters())
    run(module).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_attaching_and_detaching_again_and_again_changes_nothing(tmp_path: Path) -> None:
    module = stack(4, ends=True)
    before = snapshot(module)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    for budget in (1, 2, 3):
        engine = job(module, budget_bytes=slots_budget(module, 1, budget - 1)).attach(tmp_path)
        run(module)
        engine.detach()
        engine.detach()
    assert snapshot(module) == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()] == hooks


def test_what_a_host_asked_to_undo_is_undone_once_and_the_latest_first(tmp_path: Path) -> None:
    engine, done = job(stack()).attach(tmp_path), []
    engine.on_detach(lambda: done.append("first"))
    engine.on_detach(lambda: done.append("second"))
    engine.detach()
    engine.detach()
    assert done == ["second", "first"]


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    module, told = stack(4, ends=True), []
    task = job(module)
    engine = task.engine(tmp_path).attach(task.modules, None, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == task.network.components[0].slab_bytes
    engine.detach()


def test_progress_counts_what_comes_in_and_not_what_stays_in_its_file(tmp_path: Path) -> None:
    module, told = stack(4, ends=True), []
    twin, loading = unread(module, tmp_path)
    task = job(twin, loading=loading)
    engine = task.engine(tmp_path / "store").attach(task.modules, loading, lambda done, total: told.append((done, total)))
    left = sum(place.stored_bytes for place in engine.plan.phases[0].streamed)
    assert left > 0
    assert told[-1] == (task.network.components[0].slab_bytes - left,) * 2
    engine.detach()


def test_a_plan_for_another_model_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    module = stack(4, 16)
    before = snapshot(module)
    for other in (stack(5, 16), stack(3, 16), stack(4, 24)):
        plan = job(other).plan()
        task = job(module)
        with pytest.raises(PlanMismatch, match="make a plan for this model"):
            task.engine(tmp_path, plan).attach(task.modules, None)
        assert snapshot(module) == before
        assert task.device.arenas.held_bytes == 0
    task = job({"other": module})
    with pytest.raises(PlanMismatch, match="component 'model'"):
        task.engine(tmp_path, job(module).plan()).attach(task.modules, None)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_file_that_changed_before_attaching_is_a_fault_and_leaves_the_model_unread(damage: str, tmp_path: Path) -> None:
    module = stack(4, ends=True)
    twin, loading = unread(module, tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    before = {name: (id(p), p.device.type) for name, p in twin.named_parameters()}
    task = job(twin, loading=loading)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, len(content) - 1)
    with pytest.raises(ReadFault):
        task.attach(tmp_path / "store")
    assert {name: (id(p), p.device.type) for name, p in twin.named_parameters()} == before
    path.write_bytes(content)
    engine = task.attach(tmp_path / "store")
    assert same(run(twin), run(module))
    engine.detach()


def test_an_attachment_that_fails_at_the_last_block_can_be_repeated(tmp_path: Path) -> None:
    module = stack(4, 64)
    twin, loading = unread(module, tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    task = job(twin, loading=loading)
    os.truncate(path, len(content) - 1)
    with pytest.raises(ReadFault):
        task.attach(tmp_path / "store")
    assert task.device.arenas.held_bytes == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    with path.open("r+b") as file:
        file.write(content)
    engine = task.attach(tmp_path / "store")
    assert same(twin(rows(64)), module(rows(64)))
    engine.detach()


def test_a_file_that_is_cut_while_it_is_in_use_is_a_fault_and_the_next_call_after_its_repair_is_right(tmp_path: Path) -> None:
    module = stack(6, 64)
    expected = module(rows(64))
    twin, loading = unread(module, tmp_path)
    path = tmp_path / "model.safetensors"
    content, times = path.read_bytes(), path.stat()
    engine = job(twin, loading=loading).attach(tmp_path / "store")
    assert same(twin(rows(64)), expected)
    os.truncate(path, len(content) - 64 * 64 * 4)
    with pytest.raises(ReadFault) as caught:
        twin(rows(64))
    assert caught.value.path == path
    assert caught.value.got_bytes < caught.value.expected_bytes in (64 * 64 * 4, len(content))  # a block, or a file that changed
    with pytest.raises(ReadFault):
        twin(rows(64))
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        assert same(twin(rows(64)), expected)
    engine.detach()


def test_threads_may_call_one_model_at_the_same_time(tmp_path: Path) -> None:
    module = stack(5, ends=True)
    inputs = [rows(seed=i) for i in range(4)]
    expected = [module(x) for x in inputs]
    engine = job(module).attach(tmp_path)

    def work(index: int) -> None:
        for _ in range(10):
            assert same(module(inputs[index]), expected[index])

    in_threads(4, work)
    engine.detach()
    assert engine.device.arenas.held_bytes == 0


def test_streamed_blocks_have_their_home_on_disk_and_not_in_ram(tmp_path: Path) -> None:
    module = stack(5, 64)
    engine = job(module).attach(tmp_path)
    assert {p.home for p in engine.plan.phases[0].streamed} == {Tier.DISK}
    assert engine.device.pinned.peak_bytes == engine.device.pageable.peak_bytes == 0
    assert isinstance(engine.device, HostDevice)
    run_bytes = engine.report().disk_bytes
    assert run_bytes == 5 * 64 * 64 * 4
    engine.detach()
