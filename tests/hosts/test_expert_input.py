"""Odd experts and odd calls: right and slower, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import overflowml
from overflowml_core.facts import Tier
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine
from tests.hosts.check import assert_one_line, assert_same
from tests.hosts.moe_models import HIDDEN, MASK, PADDED, TOKENS, build
from tests.runtime.build import in_threads, job
from tests.runtime.experts.build import attach


def _attach(model: Any, folder: Any, slots: int = 3, tier: Tier = Tier.DISK) -> Engine:
    engine = attach(model, HostDevice(), folder, slots, tier)
    assert engine.experts.callers()
    return engine


def _layers(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def _are_apart(model: nn.Module) -> list[bool]:
    return [block.experts.separable for block in describe_module(model, "model").blocks if block.experts is not None]


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_experts_of_mixed_dtypes(tier, tmp_path):
    model = build("qwen3_moe", torch.bfloat16)
    first, second, _ = _layers(model)
    first.gate_up_proj.data = first.gate_up_proj.data.float()
    second.down_proj.data = second.down_proj.data.float()
    with torch.no_grad():
        theirs = model(PADDED, attention_mask=MASK).logits
        engine = _attach(model, tmp_path, tier=tier)
        assert_same(model(PADDED, attention_mask=MASK).logits, theirs)
    assert len({bank.expert_bytes for bank in engine.expert_report().banks}) == 3
    engine.detach()
    assert first.gate_up_proj.dtype == second.down_proj.dtype == torch.float32


def test_experts_with_scales_stay_with_their_blocks():
    """As the host's FP8 experts have: behind the same interface, and with parameters that its implementations do not know."""
    from transformers.integrations import finegrained_fp8, use_experts_implementation

    model = build("mixtral")
    kind = use_experts_implementation(
        type("Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=True,
        has_bias=False,
    )
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config, block_size=(8, 8)).requires_grad_(False)
    assert _are_apart(model) == [False, False, False]


def test_experts_quantized_by_torchao_stay_with_their_blocks(tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    model = build("mixtral", torch.bfloat16)
    model.set_experts_implementation("eager")
    ao.quantize_(model, ao.FqnToConfig({r"re:.*\.gate_up_proj": ao.Int8WeightOnlyConfig(version=2)}), filter_fn=None)
    assert type(_layers(model)[0].gate_up_proj) is not nn.Parameter
    assert _are_apart(model) == [False, False, False]
    theirs = model(TOKENS).logits
    with job(model).attached(tmp_path) as engine:
        assert engine.plan.strategy == "stream"
        assert_same(model(TOKENS).logits, theirs)


class _OddRouter(nn.Module):
    """Answers what no router answers when it is asked ahead of time; the model's own call is not through it."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.asked = 0

    def forward(self, hidden: torch.Tensor) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        None,
        (),
        {"logits": 3},
        torch.zeros(5),
        torch.zeros(7, 3, dtype=torch.long),
        torch.full((4, 2), 99),
        RuntimeError("odd"),
        TypeError(),
    ],
    ids=["nothing", "empty", "mapping", "flat", "wrong k", "no such expert", "error", "type error"],
)
def test_a_router_that_answers_oddly_is_not_believed(answer, tmp_path):
    model = build("qwen3_moe")
    theirs = model(TOKENS).logits
    engine = _attach(model, tmp_path)
    odd = _OddRouter(answer)
    for seat in engine.experts._conductors[0].seats:
        seat.foresight._router = odd
    for _ in range(12):
        assert_same(model(TOKENS).logits, theirs)
    assert odd.asked > 0
    engine.detach()


def _experts_call(experts: Any, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2, dtype=torch.long)
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, 2, dtype=dtype)


def test_numbers_that_stand_for_another_process(tmp_path):
    model = build("mixtral")
    experts = _layers(model)[0]
    hidden, index, weights = _experts_call(experts, 9)
    index[::2, 1] = experts.num_experts
    weights[::2, 1] = 0
    experts._is_expert_parallel = True
    theirs = experts(hidden, index, weights)
    nowhere = torch.full_like(index, experts.num_experts)
    engine = _attach(model, tmp_path)
    model(TOKENS)  # brings the phase in
    assert_same(experts(hidden, index, weights), theirs)
    assert_same(experts(hidden, nowhere, weights * 0), torch.zeros_like(hidden))
    engine.detach()


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_few_tokens_and_other_dtypes(tokens, dtype, tmp_path):
    model = build("gpt_oss")
    experts = _layers(model)[0]
    call = _experts_call(experts, tokens, dtype)
    theirs = experts(*call)
    engine = _attach(model, tmp_path)
    model(TOKENS)  # brings the phase in
    ours = experts(*call)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    engine.detach()


def test_another_implementation_is_refused_while_managed(tmp_path):
    model = build("qwen3_moe")
    engine = _attach(model, tmp_path)
    with pytest.raises(overflowml.OverflowmlError) as refused:
        model.set_experts_implementation("eager")
    assert_one_line(refused.value, "set_experts_implementation")
    assert model.get_experts_implementation() == {"": "overflowml"}
    engine.detach()
    model.set_experts_implementation("eager")
    assert model.get_experts_implementation() == {"": "eager"}


def test_a_configuration_shared_with_a_model_that_is_not_managed(tmp_path):
    model = build("qwen3_moe")
    other = type(model)(model.config).eval().requires_grad_(False)
    ours, theirs = model(TOKENS).logits, other(TOKENS).logits
    engine = _attach(model, tmp_path)
    assert_same(other(TOKENS).logits, theirs)
    assert_same(model(TOKENS).logits, ours)
    engine.detach()
    assert_same(other(TOKENS).logits, theirs)


def test_gradients_are_refused(tmp_path):
    model = build("qwen3_moe")
    engine = _attach(model, tmp_path)
    assert not model(TOKENS).logits.requires_grad
    model.train()
    with pytest.raises(overflowml.OverflowmlError) as refused:
        model(TOKENS)
    assert_one_line(refused.value, "gradients are not supported")
    engine.detach()


@pytest.mark.parametrize("name", ["qwen3_moe", "switch_transformers"])
def test_two_threads_at_once(name, tmp_path):
    model = build(name)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            more = {} if name == "qwen3_moe" else {"decoder_input_ids": tokens[:, :4]}
            return model(input_ids=tokens, **more).logits

    calls = [TOKENS, TOKENS.flip(1)]
    theirs = [run(tokens) for tokens in calls]
    engine = attach(model, HostDevice(), tmp_path, 3, Tier.DISK)
    in_threads(2, lambda number: [assert_same(run(calls[number]), theirs[number]) for _ in range(4)])
    engine.detach()


def test_a_router_that_casts_itself_on_every_call_leaves_the_cache_alone(tmp_path):
    """It puts its own classifier in its own place; nothing has come into the model."""
    model = build("switch_transformers")
    engine = attach(model, HostDevice(), tmp_path, 100, Tier.DISK)
    for _ in range(2):
        model(input_ids=TOKENS, decoder_input_ids=TOKENS)
    fetched = [bank.fetched_bytes for bank in engine.expert_report().banks]
    model(input_ids=TOKENS, decoder_input_ids=TOKENS)
    assert [bank.fetched_bytes for bank in engine.expert_report().banks] == fetched
    engine.detach()


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_adapters_on_experts_are_refused_and_not_ignored(tier, tmp_path):
    peft = pytest.importorskip("peft")
    model = build("qwen3_moe")
    engine = _attach(model, tmp_path, tier=tier)
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        with pytest.raises(overflowml.OverflowmlError) as refused:
            adapted(TOKENS)
        assert_one_line(refused.value, "Qwen3MoeExperts", "adapter", "release the model")
        engine.detach()
        assert adapted(TOKENS).logits.isfinite().all()
