"""Experts in a format: records of what torchao makes of each matrix, and outputs of a model that has the decoded values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overflowml_core.codec import Codec
from overflowml_core.errors import OverflowmlError, PlanMismatch
from overflowml_core.facts import Tier
from overflowml_core.formats import Format
from overflowml_core.loading import Loading
from overflowml_core.plan import Plan
from overflowml_core.planner.conversion import weigh_apart
from overflowml_core.runtime.device import Device, HostDevice
from overflowml_core.runtime.engine import Engine
from overflowml_core.runtime.experts.seat import slot_bytes
from tests.runtime.build import on_meta, raw, same, save, snapshot
from tests.runtime.conftest import Virtual
from tests.runtime.experts.build import expert_plan, network_of, qwen3_moe

quantization = pytest.importorskip("torchao.quantization")

from overflowml_torchao import PARTS  # noqa: E402
from overflowml_torchao.codec import TorchaoCodec  # noqa: E402

FORMATS = {name: Format(name, 8.5, "minimal", 0.01, parts=parts) for name, parts in PARTS.items()}
CONFIGS: dict[str, Any] = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}
IDS = torch.arange(3, 19)[None] % 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def qwen(dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return qwen3_moe(**sizes).to(dtype)


def mixtral(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _made(MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)), dtype)


def gpt_oss(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**_SIZES, head_dim=16, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
    model = _made(GptOssForCausalLM(config), dtype)
    for layer in model.model.layers:  # which are zeros when they are made
        nn.init.normal_(layer.mlp.experts.gate_up_proj_bias)
        nn.init.normal_(layer.mlp.experts.down_proj_bias)
    return model


_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}

MODELS = {"qwen3_moe": qwen, "mixtral": mixtral, "gpt_oss": gpt_oss}


def _made(model: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    model.init_weights()
    return model.to(dtype).eval().requires_grad_(False)


def as_torchao(matrix: torch.Tensor, form: str) -> torch.Tensor:
    """What torchao's own quantize_ makes of a matrix of outputs by inputs."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.contiguous().clone(), requires_grad=False)
    quantization.quantize_(nn.Sequential(linear), CONFIGS[form]())
    return linear.weight.data


def with_decoded_experts(model: Any, form: str) -> Any:
    """The plain model with the values that its experts' matrices have after they were converted and decoded by torchao."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for experts in (layer.mlp.experts for layer in twin.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(experts, name)
            for matrix in stack:
                turned = matrix.t() if experts.is_transposed else matrix
                decoded = as_torchao(turned, form).dequantize()
                matrix.copy_(decoded.t() if experts.is_transposed else decoded)
    return twin


def plan_in(module: nn.Module, device: Device, form: str, slots: int, tier: Tier) -> Plan:
    network = network_of(module)
    plan = expert_plan(network, device, slots, tier)
    (phase,) = plan.phases
    blocks = network.components[0].blocks
    weights = [weigh_apart(block, FORMATS[form]) for block in blocks]
    placements = tuple(
        replace(place, format=weight.format, stored_bytes=weight.dense_bytes) if place.experts_home is not None else place
        for place, weight in zip(phase.placements, weights, strict=True)
    )
    cache_bytes = slots * slot_bytes(max(weight.expert_bytes for weight in weights), device.on_host)
    return replace(plan, phases=(replace(phase, placements=placements, expert_cache_bytes=cache_bytes),), fingerprint="")


def attach(
    module: nn.Module,
    device: Device,
    folder: Path,
    form: str = "int8",
    slots: int = 3,
    tier: Tier = Tier.PINNED,
    loading: Loading | None = None,
    codec: Codec | None = None,
) -> Engine:
    from overflowml_transformers.experts import take_over

    plan = plan_in(module, device, form, slots, tier)
    codecs = {form: codec or TorchaoCodec(FORMATS[form])}
    engine = Engine(plan, network_of(module), device, folder, codecs).attach({"model": module}, loading)
    if engine.experts.callers():
        engine.on_detach(take_over(module, engine))
    return engine


def close(found: torch.Tensor, expected: torch.Tensor, most: float) -> bool:
    return bool((found.float() - expected.float()).norm() <= most * expected.float().norm())


# ---- what is made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", CONFIGS)
def test_records_hold_what_torchao_makes_of_each_matrix(name: str, form: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    engine = attach(model, HostDevice(), tmp_path, form)
    seat = engine.experts._conductors[0].seats[1]
    experts = model.model.layers[1].mlp.experts
    for number, home in enumerate(seat.home.homes):
        assert home.host is not None
        found = {(entry.weight.name.rsplit(".", 1)[1], *entry.path): raw(entry.view(home.host)) for entry in home.slab.entries}
        expected = {(bias,): raw(getattr(experts, bias)[number]) for bias in ("gate_up_proj_bias", "down_proj_bias") if experts.has_bias}
        for attribute in ("gate_up_proj", "down_proj"):
            stored = getattr(experts, attribute)[number]
            made = as_torchao(stored.t() if experts.is_transposed else stored, form)
            names, _ = made.__tensor_flatten__()
            expected.update({(attribute, part): raw(getattr(made, part)) for part in names})
        assert found == expected
        assert home.slab.nbytes == seat.home.record_bytes
    engine.detach()


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_that_the_planner_counts(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    (component,) = network_of(model).components
    weight = weigh_apart(component.blocks[0], FORMATS["int8"])
    engine = attach(model, HostDevice(), tmp_path, slots=4)
    report = engine.expert_report()
    engine.detach()
    assert component.blocks[0].experts is not None
    assert report is not None
    assert [bank.expert_bytes for bank in report.banks] == [weight.expert_bytes] * 2
    assert weight.expert_bytes < component.blocks[0].experts.nbytes
    assert weight.dense_bytes == component.blocks[0].experts.dense_bytes
    assert report.slots == 4


# ---- what is computed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_without_a_kernel_outputs_are_those_of_decoded_experts(name: str, form: str, tier: Tier, tmp_path: Path) -> None:
    """In float32 no kernel is used on processors."""
    model = MODELS[name](torch.float32)
    plain = model(IDS).logits
    expected = with_decoded_experts(model, form)(IDS).logits
    engine = attach(model, HostDevice(), tmp_path, form, tier=tier)
    for _ in range(2):
        found = model(IDS).logits
        # What gpt-oss keeps as inputs by outputs is decoded as outputs by inputs, and a product sums in another order then.
        assert same(found, expected) if name != "gpt_oss" else close(found, expected, 1e-5)
    engine.detach()
    assert same(model(IDS).logits, plain)
    assert not close(expected, plain, 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_of_processors_is_used_and_is_as_right_as_decoding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    exact = with_decoded_experts(model, "int8")
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: (calls.append(1), kernel(*args))[1])
    module, twin = model.model.layers[0].mlp.experts, exact.model.layers[0].mlp.experts
    hidden, index, weights = torch.randn(5, 64).bfloat16(), torch.tensor([[0, 2]] * 5), torch.rand(5, 2).bfloat16()
    expected = twin.float()(hidden.float(), index, weights.float())
    plain = copy.deepcopy(module).float()(hidden.float(), index, weights.float())
    engine = attach(model, HostDevice(), tmp_path)
    found = module(hidden, index, weights)
    engine.detach()
    assert len(calls) >= 4
    assert close(found, expected, 0.02)
    assert close(found, plain, 0.04)


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.DISK])
def test_on_an_accelerator_matrices_are_decoded(tier: Tier, tmp_path: Path, vgpu: Virtual) -> None:
    model = qwen()
    expected = with_decoded_experts(model, "int8")(IDS).logits
    engine = attach(model, vgpu.device, tmp_path, tier=tier)
    with torch.no_grad():
        for _ in range(2):
            assert same(model(IDS.to("vgpu")).logits.cpu(), expected)
    engine.detach()
    assert vgpu.taken_bytes == 0
    assert vgpu.pinned_bytes == 0


class Plain:
    """A codec that can do no more than convert."""

    def __init__(self) -> None:
        self._codec = TorchaoCodec(FORMATS["int8"])
        self.format, self.version = self._codec.format, self._codec.version

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        return self._codec.encode(weight)

    def template(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return self._codec.template(rows, columns, dtype)


def test_a_codec_that_cannot_compute_multiplies_as_a_layer_does(tmp_path: Path) -> None:
    model = qwen(torch.float32)
    expected = with_decoded_experts(model, "int8")(IDS).logits
    engine = attach(model, HostDevice(), tmp_path, codec=Plain())
    assert close(model(IDS).logits, expected, 1e-4)
    engine.detach()


# ---- what one sees


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.DISK])
def test_states_have_the_true_weights(tier: Tier, tmp_path: Path) -> None:
    model = gpt_oss()
    before, expected = snapshot(model), {name: raw(value) for name, value in model.state_dict().items()}
    engine = attach(model, HostDevice(), tmp_path, tier=tier)
    model(IDS)
    assert {name: raw(value) for name, value in model.state_dict().items()} == expected
    engine.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_experts_of_a_file_are_converted_from_it_and_kept(tier: Tier, dtype: torch.dtype, tmp_path: Path) -> None:
    model = qwen(dtype)
    path = save(dict(model.named_parameters()), tmp_path / "model.safetensors")
    model = model.to(torch.bfloat16)
    expected = {name: raw(value) for name, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    logits = _attached_logits(twin, tmp_path / "live")
    for run in range(2):
        twin, loading = on_meta(model, path, torch.bfloat16)
        codec = Counting(FORMATS["int8"])
        engine = attach(twin, HostDevice(), tmp_path / "store", tier=tier, loading=loading, codec=codec)
        assert codec.count == (0 if run and tier is Tier.DISK else 2 * 4 * 2)
        assert same(twin(IDS).logits, logits)
        assert {name: raw(value) for name, value in twin.state_dict().items()} == expected
        engine.detach()
        assert {name: raw(value) for name, value in twin.state_dict().items()} == expected
        assert same(twin(IDS).logits, model(IDS).logits)


class Counting(TorchaoCodec):
    """Counts what it converts."""

    def __init__(self, format: Format) -> None:
        super().__init__(format)
        self.count = 0

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().encode(weight)


def _attached_logits(model: Any, folder: Path) -> torch.Tensor:
    engine = attach(model, HostDevice(), folder)
    logits: torch.Tensor = model(IDS).logits
    engine.detach()
    return logits


def test_edits_of_converted_experts_are_refused(tmp_path: Path) -> None:
    model = qwen()
    engine = attach(model, HostDevice(), tmp_path, tier=Tier.RAM)
    model(IDS)
    model.model.layers[1].mlp.experts.down_proj.mul_(2)
    with pytest.raises(OverflowmlError, match=r"fewer bits were changed in place"):
        model(IDS)
    engine.detach()


def test_a_plan_in_a_format_that_nobody_converts_into_is_refused(tmp_path: Path) -> None:
    model = qwen()
    before = snapshot(model)
    plan = plan_in(model, HostDevice(), "int8", 3, Tier.RAM)
    with pytest.raises(PlanMismatch, match="no plugin converts"):
        Engine(plan, network_of(model), HostDevice(), tmp_path).attach({"model": model}, None)
    assert snapshot(model) == before


# ---- experts in a list


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_experts_that_are_modules_show_decoded_weights_while_they_compute(tier: Tier, tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2}
    config = SwitchTransformersConfig(**sizes, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    torch.manual_seed(2)
    model = SwitchTransformersForConditionalGeneration(config).to(torch.bfloat16).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if ".experts." in name and parameter.dim() == 2:
            parameter.copy_(as_torchao(parameter, "int8").dequantize())

    def logits(one: Any) -> torch.Tensor:
        found: torch.Tensor = one(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
        return found

    expected, plain = logits(twin), logits(model)
    before = snapshot(model)  # routers turned themselves into float32 when they were called first
    states = {name: raw(value) for name, value in model.state_dict().items()}
    engine = attach(model, HostDevice(), tmp_path, slots=3, tier=tier)
    assert not engine.experts.callers()
    assert same(logits(model), expected)
    assert {name: raw(value) for name, value in model.state_dict().items()} == states
    engine.detach()
    assert snapshot(model) == before
    assert same(logits(model), plain)
    assert not same(expected, plain)
