"""Whole models of the classes that matter, their experts apart: prefill, decode and generation give what the unmanaged model gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from overflowml_core.facts import Tier
from overflowml_core.runtime.device import Device, HostDevice
from tests.hosts.check import assert_same, tensors_in
from tests.hosts.moe_models import DECODERS, MASK, PADDED, TOKENS, TRANSLATORS, build
from tests.runtime.build import snapshot
from tests.runtime.conftest import Virtual, vgpu  # noqa: F401 -- a fixture
from tests.runtime.experts.build import attach

ROUNDED = {"gpt_oss"}
"""Classes with a gate of their own, which rounds by how many tokens it is given at once; see docs/experts-models.md."""


def _compare(name: str, ours: Any, theirs: Any) -> None:
    if name not in ROUNDED:
        assert_same(ours, theirs)
        return
    for mine, other in zip(tensors_in(ours), tensors_in(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def _generate(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


@torch.no_grad()
def _answers(model: Any) -> list[Any]:
    """Prefill, decode, a padded batch, generation with a cache that grows and one that does not."""
    first = model(TOKENS, use_cache=True)
    cache = first.past_key_values
    one = model(TOKENS[:, :1], past_key_values=cache).logits
    batch = model(PADDED, attention_mask=MASK).logits
    return [
        first.logits,
        one,
        batch,
        _generate(model, PADDED, attention_mask=MASK),
        _generate(model, TOKENS, cache_implementation="static"),
    ]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_computes_the_same_from_disk(name, tmp_path):
    model = build(name)
    theirs, before = _answers(model), snapshot(model)
    for slots in (1, 100):  # fewer than a token uses, and all
        engine = attach(model, HostDevice(), tmp_path, slots, Tier.DISK)
        assert engine.experts.callers()
        _compare(name, _answers(model), theirs)
        engine.detach()
    assert snapshot(model) == before
    _compare(name, _answers(model)[:1], theirs[:1])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_experts_in_a_list_compute_the_same_from_disk(name, tmp_path):
    model = build(name)

    @torch.no_grad()
    def answers() -> list[Any]:
        start = TOKENS[:, :4]
        batch = model(input_ids=PADDED, attention_mask=MASK, decoder_input_ids=start.repeat(2, 1)).logits
        return [model(input_ids=TOKENS, decoder_input_ids=start).logits, batch, _generate(model, TOKENS)]

    theirs, before = answers(), snapshot(model)
    for slots in (1, 3, 100):
        engine = attach(model, HostDevice(), tmp_path, slots, Tier.DISK)
        assert_same(answers(), theirs)
        report = engine.expert_report()
        assert report is not None
        assert {bank.block.split(".")[-3] for bank in report.banks} == {"encoder", "decoder"}
        assert all(bank.requests for bank in report.banks)
        engine.detach()
    assert snapshot(model) == before


@torch.no_grad()
def _short_answers(name: str, model: Any, device: Device) -> list[Any]:
    """A padded prefill and one token behind it, computed on a device and brought back."""
    to = device.torch_device
    tokens, mask = PADDED.to(to), MASK.to(to)
    if name in TRANSLATORS:
        return [model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens[:, :3]).logits.cpu()]
    first = model(tokens, attention_mask=mask, use_cache=True)
    longer = torch.cat((mask, mask[:, :1] * 0 + 1), dim=1)
    second = model(tokens[:, -1:], attention_mask=longer, past_key_values=first.past_key_values)
    return [first.logits.cpu(), second.logits.cpu()]


@pytest.mark.parametrize("name", [*DECODERS, *TRANSLATORS])
def test_a_model_computes_the_same_on_an_accelerator(name, tmp_path, vgpu: Virtual):  # noqa: F811 -- as fixtures are used
    model = build(name)
    theirs = _short_answers(name, copy.deepcopy(model).to("vgpu"), vgpu.device)
    engine = attach(model, vgpu.device, tmp_path, 3, Tier.PINNED)
    _compare(name, _short_answers(name, model, vgpu.device), theirs)
    engine.detach()


def test_generation_on_an_accelerator_keeps_to_the_managed_experts(tmp_path, vgpu: Virtual):  # noqa: F811 -- as fixtures are used
    model = build("qwen3_moe")
    with torch.no_grad():
        theirs = _generate(model, TOKENS)
        engine = attach(model, vgpu.device, tmp_path, 5, Tier.PINNED)
        # There the host changes to another implementation while it decodes, for all of its own.
        assert_same(_generate(model, TOKENS.to("vgpu")).cpu(), theirs)
    report = engine.expert_report()
    assert report is not None
    assert report.tokens == TOKENS.numel() + 4
    engine.detach()


def test_a_batch_that_uses_every_expert(tmp_path):
    model = build("qwen3_moe")
    tokens = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(tokens).logits
        engine = attach(model, HostDevice(), tmp_path, 2, Tier.DISK)
        assert_same(model(tokens).logits, theirs)
    report = engine.expert_report()
    assert report is not None
    assert all(min(bank.tokens) > 0 for bank in report.banks)
    assert all(sum(bank.tokens) == 2 * tokens.numel() for bank in report.banks)
    engine.detach()


def test_logits_of_routers_are_those_of_the_model_itself(tmp_path):
    model = build("qwen3_moe")
    with torch.no_grad():
        theirs = model(PADDED, attention_mask=MASK, output_router_logits=True)
        engine = attach(model, HostDevice(), tmp_path, 14, Tier.DISK)
        for _ in range(3):  # from the second pass on routers are asked ahead of time
            ours = model(PADDED, attention_mask=MASK, output_router_logits=True)
            assert_same(ours.router_logits, theirs.router_logits)
            assert_same(ours.aux_loss, theirs.aux_loss)
    report = engine.expert_report()
    assert report is not None
    assert report.prefetched > 0
    engine.detach()


@pytest.mark.parametrize("name", ["gpt_oss", "switch_transformers"])
def test_saving_a_managed_model_saves_true_weights(name, tmp_path):
    model = build(name)
    engine = attach(model, HostDevice(), tmp_path, 3, Tier.DISK)
    model.save_pretrained(tmp_path / "saved")
    engine.detach()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
