"""Memory that runs out while a model runs: the same result by streaming more, or a clear error and a right next call."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.runtime.elastic_state import GROWING
from overflowml_core.runtime.engine import Engine
from tests.runtime.build import Block, Stack, job, rows, same, slots_budget, snapshot, stack
from tests.runtime.conftest import Virtual
from tests.runtime.test_streaming import on_device
from tests.vdevice import Faults

SIZE_BYTES = 64 * 64 * 4
"""Of a block."""
PATIENCE = 4
"""Passes without a shortage before blocks come back."""


def kinds(engine: Engine) -> list[str]:
    return [event.kind for event in engine.events]


def resident_bytes(engine: Engine) -> int:
    return sum(phase.resident_bytes for phase in engine.plan.phases)


class Neighbour:
    """Another program's memory on the device."""

    def __init__(self, vgpu: Virtual, left_bytes: int) -> None:
        self.data = torch.empty(vgpu.sim.config.budget_bytes - vgpu.sim.allocated_bytes - left_bytes, dtype=torch.uint8, device="vgpu")


@pytest.mark.parametrize("tier", ["pinned", "ram", "disk"])
def test_a_larger_input_is_computed_with_fewer_residents(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64, ends=True)
    large = rows(64, 300)
    expected, small, before = on_device(module, large), on_device(module, rows(64)), snapshot(module)
    budget = slots_budget(module, 1, 4)
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=budget, tier=tier).attached(tmp_path) as engine:
        x = large.to("vgpu")
        full = resident_bytes(engine)
        vgpu.limit(budget + 3 * large.numel() * 4 + 24_000)
        assert same(module(x).cpu(), expected)
        assert resident_bytes(engine) < full
        assert "demoted" in kinds(engine)
        assert kinds(engine)[-1] == "retried"
        assert sum(e.nbytes for e in engine.events if e.kind == "demoted") >= full - resident_bytes(engine)
        events = len(engine.events)
        assert same(module(x).cpu(), expected)
        assert same(module(rows(64).to("vgpu")).cpu(), small)
        assert len(engine.events) == events  # the room is there from the first time on
        del x
    assert snapshot(module) == before
    gc.collect()
    assert (vgpu.taken_bytes, vgpu.pinned_bytes) == (0, 0)


def test_blocks_come_back_when_the_neighbour_leaves_them_room(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64)
    expected = on_device(module, rows(64))
    budget = slots_budget(module, 1, 4)
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=budget).attached(tmp_path) as engine:
        x = rows(64).to("vgpu")
        full = engine.plan.phases[0]
        vgpu.limit(budget + 8 * SIZE_BYTES)
        module(x)
        neighbour = Neighbour(vgpu, 512)
        assert same(module(x).cpu(), expected)
        since = engine.plan.phases[0]
        assert since.resident_bytes < full.resident_bytes
        enough = full.device_bytes - since.device_bytes + full.slot_bytes
        del neighbour
        neighbour = Neighbour(vgpu, enough - 512)
        for _ in range(3 * PATIENCE):
            assert same(module(x).cpu(), expected)
        assert kinds(engine) == ["demoted", "retried"]  # others hold the last bytes that they would need
        del neighbour
        neighbour = Neighbour(vgpu, enough)
        for _ in range(PATIENCE):
            assert same(module(x).cpu(), expected)
        assert kinds(engine) == ["demoted", "retried", "promoted"]
        assert engine.plan.phases[0] == full
        assert engine.events[-1].nbytes == full.device_bytes - since.device_bytes
        del neighbour


class Watched(Stack):
    """Tells of its calls before it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tell()
        return super().forward(x)


def test_who_comes_back_too_early_waits_twice_as_long_the_next_time(tmp_path: Path, vgpu: Virtual) -> None:
    torch.manual_seed(0)
    module = Watched(6, 64).eval().requires_grad_(False)
    module.tell = lambda: None
    expected = on_device(module, rows(64))
    budget = slots_budget(module, 1, 4)
    waits: list[int] = []
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=budget).attached(tmp_path) as engine:

        def tell() -> None:
            if kinds(engine)[-1:] == ["promoted"]:
                vgpu.sim.faults = Faults(alloc={3})  # in the very call that brought blocks back

        module.tell = tell
        x = rows(64).to("vgpu")
        vgpu.limit(budget + 8 * SIZE_BYTES)
        neighbour = Neighbour(vgpu, 512)
        assert same(module(x).cpu(), expected)
        del neighbour
        for _ in range(3):
            promoted, waits = kinds(engine).count("promoted"), [*waits, 0]
            while kinds(engine).count("promoted") == promoted:
                assert waits[-1] < 100
                assert same(module(x).cpu(), expected)
                waits[-1] += 1
            assert kinds(engine)[-3:] == ["promoted", "demoted", "retried"]
        module.tell = lambda: None
    assert waits == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE]


def test_every_allocation_of_a_pass_may_fail_and_the_result_is_the_same(tmp_path: Path, vgpu: Virtual) -> None:
    module = stack(6, 64, ends=True)
    expected = on_device(module, rows(64))
    with torch.no_grad():
        for k in range(1, 30):
            with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
                x = rows(64).to("vgpu")
                vgpu.sim.faults = Faults(alloc={k})
                assert same(module(x).cpu(), expected), k
                vgpu.sim.faults = Faults()
                assert same(module(x).cpu(), expected), k
                if not engine.events:
                    break
                assert "retried" in kinds(engine)
                del x
    assert k > 10


def test_a_phase_that_finds_no_room_comes_in_with_fewer_residents(tmp_path: Path, vgpu: Virtual) -> None:
    modules = {f"part{i}": stack(6, 64, seed=i) for i in range(2)}
    expected = {name: on_device(m, rows(64)) for name, m in modules.items()}
    budget = slots_budget(modules["part0"], 1, 4)
    with torch.no_grad(), job(modules, vgpu.device, budget_bytes=budget).attached(tmp_path) as engine:
        x = rows(64).to("vgpu")
        modules["part0"](x)
        full = {phase.name: phase.resident_bytes for phase in engine.plan.phases}
        vgpu.limit(3 * SIZE_BYTES)
        assert same(modules["part0"](x).cpu(), expected["part0"])
        before = len(engine.events)
        assert same(modules["part1"](x).cpu(), expected["part1"])
        # No code of part1 ran when it found no room: it comes in with less, and nothing is called again.
        came = list(engine.events)[before:]
        assert {event.kind for event in came} == {"demoted"}
        assert all("no room for part1" in event.reason for event in came)
        assert all(phase.resident_bytes < full[phase.name] for phase in engine.plan.phases)
        events = len(engine.events)
        for name, module in modules.items():
            assert same(module(x).cpu(), expected[name])
        assert len(engine.events) == events  # both have learned what there is


class Cache:
    """As hosts have them: keys joined into new tensors, or written in place."""

    def __init__(self, in_place: bool) -> None:
        self.seen = torch.zeros(64, 64, device="vgpu") if in_place else torch.zeros(0, 64, device="vgpu")
        self.in_place, self.length = in_place, 0

    def update(self, x: torch.Tensor) -> None:
        if self.in_place:
            self.seen[self.length : self.length + len(x)] = x
        else:
            self.seen = torch.cat([self.seen, x])
        self.length += len(x)


class Remembering(Stack):
    """Each block but the first sees all that the cache was given."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        for block in self.blocks:
            cache.update(x)
            x = block(x) + cache.seen.sum(0)
        return x


def remembering() -> Remembering:
    torch.manual_seed(0)
    return Remembering(6, 64).eval().requires_grad_(False)


@pytest.fixture
def known_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROWING, Cache, {"seen": 0})


def test_a_call_keeps_alive_nothing_that_a_plain_one_lets_go(tmp_path: Path, vgpu: Virtual) -> None:
    module, x = remembering(), rows(64).to("vgpu")
    plain = remembering().to("vgpu")

    def peak_bytes(called: nn.Module) -> int:
        cache = Cache(False)
        with torch.no_grad():
            called(x, cache)
            before_bytes = vgpu.sim.peak_bytes = vgpu.sim.allocated_bytes
            called(x, cache)
        return vgpu.sim.peak_bytes - before_bytes

    expected = peak_bytes(plain)
    with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path):
        assert peak_bytes(module) <= expected


def test_a_cache_that_nobody_knows_is_not_gone_over_again(tmp_path: Path, vgpu: Virtual) -> None:
    module, x = remembering(), rows(64).to("vgpu")
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        cache = Cache(False)
        module(x, cache)
        vgpu.sim.faults = Faults(alloc={10})
        with pytest.raises(torch.OutOfMemoryError):
            module(x, cache)
        vgpu.sim.faults = Faults()
        assert "not retried" in kinds(engine)
        assert "nobody knows how to take that back" in next(event.reason for event in engine.events if event.kind == "not retried")


@pytest.mark.usefixtures("known_cache")
def test_a_cache_that_grows_into_new_tensors_is_put_back(tmp_path: Path, vgpu: Virtual) -> None:
    module = remembering()
    plain = remembering().to("vgpu")
    x = rows(64).to("vgpu")
    with torch.no_grad():
        wanted = Cache(False)
        expected = [plain(x, wanted).cpu() for _ in range(3)]
        for k in range(1, 40, 3):
            with job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
                cache = Cache(False)
                assert same(module(x, cache).cpu(), expected[0])
                vgpu.sim.faults = Faults(alloc={k})
                assert same(module(x, cache).cpu(), expected[1]), k
                vgpu.sim.faults = Faults()
                assert same(module(x, cache).cpu(), expected[2]), k
                assert cache.length == wanted.length
                assert same(cache.seen.cpu(), wanted.seen.cpu())
                assert k > 12 or "retried" in kinds(engine)


def test_a_cache_that_was_written_in_place_is_not_gone_over_again(tmp_path: Path, vgpu: Virtual) -> None:
    module = remembering()
    x = rows(64).to("vgpu")
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        expected = module(x, Cache(True)).cpu()
        full = resident_bytes(engine)
        vgpu.sim.faults = Faults(alloc={6})
        with pytest.raises(torch.OutOfMemoryError):
            module(x, Cache(True))
        vgpu.sim.faults = Faults()
        last = [e for e in engine.events if e.kind == "not retried"]
        assert "written to in place" in last[0].reason
        assert resident_bytes(engine) < full  # the next call has the room
        assert same(module(x, Cache(True)).cpu(), expected)


class Noisy(Stack):
    """Draws in its forward, counts in a buffer or in an attribute."""

    def __init__(self, counts: bool) -> None:
        super().__init__(6, 64)
        self.counts, self.calls = counts, 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = x + torch.randn(64).to(x.device)
        if self.counts:
            self.count += 1
        return super().forward(x)


def test_random_numbers_and_attributes_are_those_of_one_call(tmp_path: Path, vgpu: Virtual) -> None:
    module = Noisy(False).eval().requires_grad_(False)
    torch.manual_seed(3)
    expected = on_device(module, rows(64))
    after = torch.rand(1)
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        x = rows(64).to("vgpu")
        torch.manual_seed(3)
        vgpu.sim.faults = Faults(alloc={7})
        assert same(module(x).cpu(), expected)
        vgpu.sim.faults = Faults()
        assert "retried" in kinds(engine)
        assert torch.equal(torch.rand(1), after)
        assert module.calls == 1


@pytest.mark.parametrize("what", ["buffer", "hook"])
def test_a_model_that_keeps_count_is_not_called_again(what: str, tmp_path: Path, vgpu: Virtual) -> None:
    module: nn.Module = Noisy(what == "buffer").eval().requires_grad_(False)
    seen: list[int] = []
    block = next(m for m in module.modules() if isinstance(m, Block))
    if what == "hook":
        block.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), job(module, vgpu.device, budget_bytes=slots_budget(module, 2, 3)).attached(tmp_path) as engine:
        x = rows(64).to("vgpu")
        module(x)
        vgpu.sim.faults = Faults(alloc={9})
        with pytest.raises(torch.OutOfMemoryError):
            module(x)
        vgpu.sim.faults = Faults()
        assert "not retried" in kinds(engine)
        module(x)
