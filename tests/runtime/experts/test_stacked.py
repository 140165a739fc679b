"""Models with stacked experts run by a cache of them: the same results whatever its size and wherever experts wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overflowml_core.errors import OverflowmlError, PlanMismatch, ReadFault
from overflowml_core.expert_setting import ExpertSetting
from overflowml_core.facts import Tier
from overflowml_core.runtime.device import HostDevice
from tests.runtime.build import in_threads, on_meta, raw, same, save, snapshot
from tests.runtime.conftest import Virtual
from tests.runtime.experts.build import attach, expert_plan, network_of, qwen3_moe

IDS = torch.arange(3, 27)[None] % 97


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen3_moe()


@pytest.fixture(scope="module")
def expected(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model(IDS).logits, model(IDS[:, :1]).logits


@pytest.mark.parametrize("slots", [1, 3, 12, 30, 64, 100])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_results_do_not_depend_on_the_cache(model: Any, tmp_path: Path, slots: int, implementation: str) -> None:
    model.set_experts_implementation(implementation)
    prefill, token = model(IDS).logits, model(IDS[:, :1]).logits
    engine = attach(model, HostDevice(), tmp_path, slots, Tier.DISK)
    try:
        for _ in range(2):
            assert same(model(IDS).logits, prefill)
            assert same(model(IDS[:, :1]).logits, token)
        report = engine.expert_report()
        assert report is not None
        assert report.slots == min(slots, 64)
        unused_bytes = max(slots - 64, 0) * report.slot_bytes + buffer_bytes(model)
        assert engine.device.arenas.held_bytes == engine.plan.phases[0].device_bytes - unused_bytes
    finally:
        engine.detach()
        model.set_experts_implementation("grouped_mm")


def buffer_bytes(model: Any) -> int:
    return sum(-(-buffer.nbytes // 512) * 512 for buffer in model.buffers())


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.RAM, Tier.DISK])
@pytest.mark.parametrize("slots", [2, 12, 64])
def test_on_an_accelerator(model: Any, expected: Any, tmp_path: Path, vgpu: Virtual, tier: Tier, slots: int) -> None:
    engine = attach(model, vgpu.device, tmp_path, slots, tier)
    with torch.no_grad():
        for _ in range(2):
            assert same(model(IDS.to("vgpu")).logits.cpu(), expected[0])
            assert same(model(IDS[:, :1].to("vgpu")).logits.cpu(), expected[1])
    engine.detach()
    assert vgpu.taken_bytes == 0
    assert vgpu.pinned_bytes == 0
    assert same(model(IDS).logits, expected[0])


def test_a_cache_of_all_experts_fetches_each_once(model: Any, tmp_path: Path) -> None:
    engine = attach(model, HostDevice(), tmp_path, 64, Tier.DISK, setting=ExpertSetting(looks_ahead=False))
    model(IDS)
    first = engine.expert_report()
    model(IDS)
    second = engine.expert_report()
    engine.detach()
    assert first is not None
    assert second is not None
    assert first.hit_rate == 0
    assert first.fetched_bytes == sum(bank.expert_bytes * len(bank.cached) for bank in first.banks)
    assert second.fetched_bytes == first.fetched_bytes
    assert second.hit_rate == 0.5
    assert sum(first.banks[0].tokens) == IDS.numel() * 4
    assert (second.tokens, second.passes) == (2 * IDS.numel(), 2)


def test_everything_is_as_before_afterwards(model: Any, tmp_path: Path) -> None:
    before = snapshot(model)
    for tier in (Tier.DISK, Tier.PINNED):
        attach(model, HostDevice(), tmp_path, 12, tier).detach()
        assert snapshot(model) == before
    assert "set_experts_implementation" not in vars(model)


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.PINNED])
def test_states_have_the_true_weights(model: Any, tmp_path: Path, tier: Tier) -> None:
    expected = {name: raw(value) for name, value in model.state_dict().items()}
    engine = attach(model, HostDevice(), tmp_path, 12, tier)
    model(IDS)
    assert {name: raw(value) for name, value in model.state_dict().items()} == expected
    model.save_pretrained(tmp_path / "saved")
    engine.detach()
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert {name: raw(value) for name, value in loaded.state_dict().items()} == expected


def test_experts_are_read_from_the_models_own_file(expected: Any, tmp_path: Path) -> None:
    model = qwen3_moe()
    path = save(dict(model.named_parameters()), tmp_path / "model.safetensors")
    twin, loading = on_meta(model, path)
    engine = attach(twin, HostDevice(), tmp_path / "store", 12, Tier.DISK, loading)
    assert same(twin(IDS).logits, expected[0])
    assert {n: raw(v) for n, v in twin.state_dict().items()} == {n: raw(v) for n, v in model.state_dict().items()}
    assert not list((tmp_path / "store").glob("*"))
    engine.detach()
    assert same(twin(IDS).logits, expected[0])


def test_experts_that_are_cast_on_the_way_are_packed(tmp_path: Path) -> None:
    model = qwen3_moe()
    path = save(dict(model.named_parameters()), tmp_path / "model.safetensors")
    twin, loading = on_meta(model, path, torch.bfloat16)
    cast = qwen3_moe()
    for parameter in cast.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = cast(IDS).logits
    for tier in (Tier.DISK, Tier.PINNED):
        engine = attach(twin, HostDevice(), tmp_path / "store", 12, tier, loading)
        assert same(twin(IDS).logits, expected)
        engine.detach()
        assert same(twin(IDS).logits, expected)
        twin, loading = on_meta(model, path, torch.bfloat16)


def test_a_file_that_changes_is_an_error_and_not_garbage(tmp_path: Path) -> None:
    model = qwen3_moe()
    path = save(dict(model.named_parameters()), tmp_path / "model.safetensors")
    twin, loading = on_meta(model, path)
    engine = attach(twin, HostDevice(), tmp_path / "store", 2, Tier.DISK, loading)
    twin(IDS)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(ReadFault):
            twin(IDS)
    engine.detach()


def test_weights_edited_in_place_are_used(model: Any, tmp_path: Path) -> None:
    model = qwen3_moe(seed=5)
    engine = attach(model, HostDevice(), tmp_path, 64, Tier.RAM)
    model(IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2)
    found = model(IDS).logits
    engine.detach()
    assert same(model(IDS).logits, found)


def test_edits_of_experts_on_disk_are_refused(tmp_path: Path) -> None:
    model = qwen3_moe(seed=6)
    engine = attach(model, HostDevice(), tmp_path, 64, Tier.DISK)
    model(IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2)
    with pytest.raises(OverflowmlError, match="changed in place"):
        model(IDS)
    engine.detach()


def test_a_token_that_is_routed_nowhere(model: Any, tmp_path: Path) -> None:
    engine = attach(model, HostDevice(), tmp_path, 12, Tier.DISK)
    module = model.model.layers[0].mlp.experts
    hidden, weights = torch.randn(3, 32), torch.rand(3, 4)
    index = torch.tensor([[16, 16, 16, 16], [0, 16, 3, 16], [5, 6, 7, 8]])
    mixed = module(hidden, index, weights)
    none = module(hidden, torch.full_like(index, 16), weights)
    empty = module(hidden[:0], index[:0], weights[:0])
    engine.detach()
    module._is_expert_parallel = True
    assert torch.equal(mixed[1:], module(hidden, index, weights)[1:])
    module._is_expert_parallel = False
    assert not mixed[0].any()
    assert not none.any()
    assert empty.shape == (0, 32)


def test_threads_take_turns(model: Any, expected: Any, tmp_path: Path) -> None:
    engine = attach(model, HostDevice(), tmp_path, 9, Tier.DISK)

    def work(index: int) -> None:
        for _ in range(3):
            assert same(model(IDS[:, : 1 if index % 2 else None]).logits, expected[index % 2])

    in_threads(4, work)
    engine.detach()


def test_a_warm_cache_starts_with_the_experts_that_were_used_most(model: Any, tmp_path: Path) -> None:
    block = "model.layers.2"
    heat = {("model", block): tuple(4.0 if expert in (3, 11) else 0.1 for expert in range(16))}
    engine = attach(model, HostDevice(), tmp_path, 2, Tier.DISK, setting=ExpertSetting(heat=heat))
    report = engine.expert_report()
    engine.detach()
    assert report is not None
    assert [bank.cached for bank in report.banks if bank.block == block] == [(3, 11)]


def test_the_processor_helps_where_it_is_faster(model: Any, expected: Any, tmp_path: Path, vgpu: Virtual) -> None:
    setting = ExpertSetting(fetch_bytes_per_s=1e9, cpu_bytes_per_s=1e9)
    engine = attach(model, vgpu.device, tmp_path, 4, Tier.PINNED, setting=setting)
    with torch.no_grad():
        assert same(model(IDS[:, :1].to("vgpu")).logits.cpu(), expected[1])
    report = engine.expert_report()
    engine.detach()
    assert report is not None
    assert 0 < report.on_cpu < report.requests


def test_a_cache_without_room_for_one_expert_is_refused(model: Any, tmp_path: Path) -> None:
    before = snapshot(model)
    with pytest.raises(PlanMismatch, match="holds no expert"):
        attach(model, HostDevice(), tmp_path, 0, Tier.DISK)
    assert snapshot(model) == before


def test_no_memory_for_the_cache_leaves_the_model_as_it_was(model: Any, tmp_path: Path, vgpu: Virtual) -> None:
    before = snapshot(model)
    plan = expert_plan(network_of(model), vgpu.device, 12, Tier.PINNED)
    vgpu.limit(plan.phases[0].expert_cache_bytes - 512)
    with pytest.raises(torch.OutOfMemoryError):
        attach(model, vgpu.device, tmp_path, 12, Tier.PINNED)
    assert snapshot(model) == before
    assert vgpu.taken_bytes == 0


def test_dense_blocks_are_streamed_where_they_and_the_cache_find_no_room(model: Any, tmp_path: Path, vgpu: Virtual) -> None:
    before, expected = snapshot(model), model(IDS).logits
    plan = expert_plan(network_of(model), vgpu.device, 12, Tier.PINNED)
    vgpu.limit(plan.phases[0].device_bytes - 512)
    engine = attach(model, vgpu.device, tmp_path, 12, Tier.PINNED)
    assert [event.kind for event in engine.events] == ["demoted"]
    vgpu.limit(2**40)
    with torch.no_grad():
        assert same(model(IDS.to("vgpu")).logits.cpu(), expected)
    engine.detach()
    assert snapshot(model) == before
    assert vgpu.taken_bytes == 0


def test_the_next_blocks_experts_come_ahead_of_time(tmp_path: Path) -> None:
    # Blocks that add next to nothing: all routers see the same hidden states, and all of them are the same.
    model = qwen3_moe(seed=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.copy_(model.model.layers[0].mlp.gate.weight)
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.experts.down_proj.data.zero_()
    engine = attach(model, HostDevice(), tmp_path, 32, Tier.DISK)
    for token in range(12):
        model(IDS[:, token : token + 1])
    report = engine.expert_report()
    engine.detach()
    assert report is not None
    assert report.prefetched > 0
    assert report.prefetch_hits >= 0.9 * report.prefetched
    # All passes were of single tokens; what came ahead of time is no hit of the cache.
    assert (report.token_requests, report.token_hits) == (report.requests, sum(one.hits for one in report.banks))


def test_passes_of_single_tokens_are_counted_apart(tmp_path: Path) -> None:
    model = qwen3_moe(seed=1)
    engine = attach(model, HostDevice(), tmp_path, 32, Tier.DISK)
    model(IDS)
    before = engine.expert_report()
    model(IDS[:, :1])
    after = engine.expert_report()
    engine.detach()
    assert before is not None
    assert after is not None
    assert before.requests > 0
    assert (before.token_requests, before.token_hits) == (0, 0)
    assert after.token_requests == after.requests - before.requests == sum(bank.per_token for bank in after.banks)
    assert 0 < after.token_hits <= after.token_requests


def test_a_plan_for_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = qwen3_moe()
    plan = expert_plan(network_of(model), HostDevice(), 4, Tier.DISK)
    dense = qwen3_moe(mlp_only_layers=[0, 1, 2, 3])
    from overflowml_core.runtime.engine import Engine

    with pytest.raises(PlanMismatch):
        Engine(plan, network_of(dense), HostDevice(), tmp_path).attach({"model": dense}, None)
