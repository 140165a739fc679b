"""Weights converted on their way: what computes is what torchao makes of the same layers, and what is given back is what was there."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overflowml_core.codec import Codec
from overflowml_core.errors import PlanMismatch, ReadFault
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.formats import Format
from overflowml_core.loading import Loading
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from overflowml_core.planner.conversion import weigh
from overflowml_core.runtime import slab_content
from overflowml_core.runtime.device import Device, HostDevice
from overflowml_core.runtime.encode import recipe_of
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.parts import parts_of
from tests.runtime.build import Job, job, on_meta, raw, rows, same, save, snapshot, stack
from tests.runtime.conftest import Virtual

quantization = pytest.importorskip("torchao.quantization")

from overflowml_torchao import PARTS  # noqa: E402
from overflowml_torchao.codec import TorchaoCodec  # noqa: E402

FORMATS = {name: Format(name, 8.5, "minimal", 0.01, parts=parts) for name, parts in PARTS.items()}
CONFIGS: dict[str, Callable[..., Any]] = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}
WIDTH = 64
ROOM = 2**18
"""For activations, and for what torchao holds while it decodes."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On weights this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    """A model, and how it is to run."""

    module: nn.Module
    device: Device
    tier: str = "pinned"
    form: str = "int8"
    loading: Loading | None = None
    resident: int = 0

    @property
    def job(self) -> Job:
        return job(self.module, self.device, tier=self.tier, loading=self.loading, reserve_bytes=ROOM)

    def plan(self) -> Plan:
        """With room for two slots and so many residents, all of the size of a converted block; on disk where RAM holds the ring alone."""
        asked = self.job
        (component,) = asked.network.components
        block_bytes = weigh(component.blocks[0], FORMATS[self.form]).slab_bytes
        limits = Limits.exactly(
            device_memory=component.resident_bytes + (2 + self.resident) * block_bytes + ROOM,
            host_memory=2 * block_bytes if self.tier == "disk" and not self.device.on_host else None,
            reserve=ROOM,
            quality="minimal",
        )
        return make_plan(asked.network, asked.machine, Workload(), limits, (FORMATS[self.form],), frozenset({"formats"}))

    def attach(self, folder: Path, codec: Codec | None = None, plan: Plan | None = None) -> Engine:
        asked, chosen = self.job, plan or self.plan()
        assert chosen.formats == (self.form,)
        engine = Engine(chosen, asked.network, self.device, folder, {self.form: codec or TorchaoCodec(FORMATS[self.form])})
        return engine.attach(asked.modules, self.loading)


def model(**options: Any) -> nn.Module:
    made = stack(4, WIDTH, hidden=96, bias=True, ends=True, **options)
    made.inlet.weight[0, 0] = float("nan")  # outside the blocks: seen in the output, and never converted
    return made


def called(module: nn.Module, device: Device, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x.to(device.torch_device)).cpu()


def quantized(module: nn.Module, form: str, device: Device, x: torch.Tensor) -> torch.Tensor:
    """What the model computes with torchao applied to the linear layers of its blocks."""
    twin = copy.deepcopy(module)
    quantization.quantize_(twin.blocks, CONFIGS[form](set_inductor_config=False))
    found = called(twin.to(device.torch_device), device, x)
    del twin
    gc.collect()  # torchao gives layers a method of their own: they refer to themselves
    return found


@pytest.mark.parametrize(("form", "tier"), [("int8", "pinned"), ("fp8", "ram"), ("int8", "disk"), ("fp8", "disk")])
def test_blocks_compute_as_torchao_has_them_and_come_back_as_they_were(form: str, tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    before = snapshot(module)
    expected = quantized(module, form, vgpu.device, rows(WIDTH))
    case = Case(module, vgpu.device, tier, form)
    plan = case.plan()
    assert {p.tier.value for p in plan.phases[0].streamed} == {tier}
    engine = case.attach(tmp_path, plan=plan)
    vgpu.limit(plan.budget.device_bytes)
    for _ in range(2):
        assert same(called(module, vgpu.device, rows(WIDTH)), expected)
    assert vgpu.peak_bytes <= plan.budget.device_bytes
    engine.detach()
    assert snapshot(module) == before
    assert vgpu.taken_bytes == 0


@pytest.mark.parametrize(("form", "resident"), [("int8", 0), ("fp8", 1), ("int8", 2)])
def test_on_a_machine_without_an_accelerator(form: str, resident: int, tmp_path: Path) -> None:
    module, device = model(), HostDevice()
    before = snapshot(module)
    expected = quantized(module, form, device, rows(WIDTH))
    case = Case(module, device, form=form, resident=resident)
    plan = case.plan()
    assert plan.kind == ("direct" if resident == 2 else "stream")
    engine = case.attach(tmp_path, plan=plan)
    assert same(called(module, device, rows(WIDTH)), expected)
    engine.detach()
    assert snapshot(module) == before


def test_slabs_take_the_bytes_of_the_plan_to_the_byte(tmp_path: Path) -> None:
    module = model()
    engine = Case(module, HostDevice(), form="fp8").attach(tmp_path)
    (phase,) = engine.plan.phases
    for place in phase.placements:
        held = engine._blocks[place.component, place.block]
        assert held.slab.nbytes == place.stored_bytes < engine.network.components[0].blocks[0].slab_bytes
    engine.detach()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_read_cast_and_converted_from_their_file(stored: torch.dtype, tmp_path: Path) -> None:
    plain = stack(4, WIDTH, hidden=96, ends=True).to(torch.bfloat16)
    path = save({name: tensor.to(stored) for name, tensor in plain.state_dict().items()}, tmp_path / "model.safetensors")
    module, loading = on_meta(plain, path, torch.bfloat16)
    device = HostDevice()
    x = rows(WIDTH).to(torch.bfloat16)
    engine = Case(module, device, "disk", "int8", loading).attach(tmp_path / "cache")
    assert same(called(module, device, x), quantized(plain, "int8", device, x))
    assert {name: raw(t) for name, t in module.state_dict().items()} == {name: raw(t) for name, t in plain.state_dict().items()}
    engine.detach()
    assert {name: raw(t) for name, t in module.named_parameters()} == {name: raw(t) for name, t in plain.named_parameters()}
    assert all(type(p.data) is torch.Tensor for p in module.parameters())


class Counting(TorchaoCodec):
    """Counts what it converts."""

    def __init__(self, format: Format, version: str = "1") -> None:
        super().__init__(format)
        self.version, self.count = version, 0

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().encode(weight)


def test_what_was_converted_once_is_kept_for_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_content, "_SETTLED_NS", -(10**18))  # a file as young as this has another key when it is older
    plain = stack(4, WIDTH, hidden=96)
    path = save(plain.state_dict(), tmp_path / "model.safetensors")
    counts, outputs = [], []
    for version in ("1", "1", "2"):
        module, loading = on_meta(plain, path)
        codec = Counting(FORMATS["int8"], version)
        engine = Case(module, HostDevice(), "disk", "int8", loading).attach(tmp_path / "cache", codec)
        streamed = sum(1 for held in engine._held if held.home.tier is Tier.DISK and recipe_of(held.slab))
        outputs.append(called(module, engine.device, rows(WIDTH)))
        engine.detach()
        counts.append(codec.count - 2 * (4 - streamed))
    assert counts == [2 * streamed, 0, 2 * streamed]
    assert streamed > 1
    assert same(outputs[0], outputs[1])


def test_state_dict_shows_the_true_weights_wherever_the_model_is(tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    before = {name: raw(tensor) for name, tensor in module.state_dict().items()}
    engine = Case(module, vgpu.device).attach(tmp_path)
    for _ in range(2):
        shown = module.state_dict()
        assert {name: raw(tensor) for name, tensor in shown.items()} == before
        assert type(module.blocks[0].up.weight.data) is not torch.Tensor
        called(module, vgpu.device, rows(WIDTH))
    engine.detach()
    assert not any(inner._state_dict_hooks for inner in module.modules())


def test_a_model_on_the_device_gives_up_its_place_there(tmp_path: Path, vgpu: Virtual) -> None:
    module = model().to("vgpu")
    before = snapshot(module)
    expected = quantized(module, "int8", vgpu.device, rows(WIDTH))
    held = vgpu.taken_bytes
    engine = Case(module, vgpu.device).attach(tmp_path)
    assert vgpu.taken_bytes < held
    assert same(called(module, vgpu.device, rows(WIDTH)), expected)
    engine.detach()
    assert snapshot(module) == before


def test_a_plan_in_a_format_that_nobody_makes_is_refused(tmp_path: Path) -> None:
    module = model()
    before, case = snapshot(module), Case(model(), HostDevice())
    engine = Engine(case.plan(), case.job.network, case.device, tmp_path)
    with pytest.raises(PlanMismatch, match="in int8, into which no plugin converts weights here"):
        engine.attach({"model": module}, None)
    assert snapshot(module) == before


class Heavier(TorchaoCodec):
    """Makes other parts than the planner was told of."""

    def template(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return super().template(2 * rows, columns, dtype)


def test_parts_that_the_plan_did_not_count_are_refused(tmp_path: Path) -> None:
    module = model()
    before = snapshot(module)
    with pytest.raises(PlanMismatch, match=r"the plan has \d+ bytes, the model a block of"):
        Case(module, HostDevice()).attach(tmp_path, Heavier(FORMATS["int8"]))
    assert snapshot(module) == before


class Failing(Counting):
    """Fails in the middle of a model."""

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        if self.count == 3:
            raise ReadFault(Path("model.safetensors"), 0, 1, 0, "gone")
        return super().encode(weight)


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_a_conversion_that_fails_leaves_everything_as_it_was(tier: str, tmp_path: Path, vgpu: Virtual) -> None:
    module = model()
    before = snapshot(module)
    with pytest.raises(ReadFault):
        Case(module, vgpu.device, tier).attach(tmp_path, Failing(FORMATS["int8"]))
    assert snapshot(module) == before
    assert vgpu.taken_bytes == 0


def test_one_weight_at_a_time_is_held_beside_the_slab(tmp_path: Path) -> None:
    """A weight is let go before the next one is read: at most the one that is converted has its bytes in RAM."""
    plain = stack(3, WIDTH, hidden=96)
    module, loading = on_meta(plain, save(plain.state_dict(), tmp_path / "model.safetensors"))
    alive: list[int] = []

    class Watching(Counting):
        def encode(self, weight: torch.Tensor) -> torch.Tensor:
            held.append(weight.untyped_storage()._weak_ref())
            alive.append(sum(not torch.UntypedStorage._expired(ref) for ref in held))
            return super().encode(weight)

    held: list[int] = []
    engine = Case(module, HostDevice(), "disk", "int8", loading).attach(tmp_path / "cache", Watching(FORMATS["int8"]))
    engine.detach()
    for ref in held:
        torch.UntypedStorage._free_weak_ref(ref)
    assert len(alive) == 6
    assert max(alive) == 1


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_template_and_weight_have_the_same_parts(form: str) -> None:
    codec = TorchaoCodec(FORMATS[form])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made, like = codec.encode(torch.randn(33, 17, dtype=dtype)), codec.template(33, 17, dtype)
        described = [[(p.path, p.tensor.shape, p.tensor.dtype, p.tensor.stride()) for p in parts_of(t)] for t in (made, like)]
        assert described[0] == described[1]
        assert [p.nbytes for p in parts_of(like)] == [part.nbytes(33, 17) for part in PARTS[form]]
