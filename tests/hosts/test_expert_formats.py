"""``from_pretrained(..., overflow=...)`` with a quality that permits formats: routed experts are converted, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import overflowml
from tests.hosts.check import assert_same_weights
from tests.hosts.moe_models import TOKENS, build
from tests.runtime.experts.test_encoded import with_decoded_experts

WIDE: dict[str, dict[str, int]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
    "mixtral": {"hidden_size": 64, "intermediate_size": 64},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64},
}
"""Wide enough for scales and zero points to take less than what is saved."""


def _saved(name: str, folder: Path, quality: str) -> overflowml.Limits:
    model = build(name, torch.bfloat16, **WIDE[name])
    model.save_pretrained(folder)
    experts = sum(p.nbytes for path, p in model.named_parameters() if ".experts." in path)
    whole = sum(p.nbytes for p in model.parameters())
    barred = frozenset({("fp8", "*")})
    return overflowml.Limits.exactly(device_memory=whole - experts // 3, reserve=0, quality=quality, excluded=barred)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits.float()
    return logits


@pytest.mark.parametrize("name", WIDE)
def test_experts_are_converted_where_quality_permits_it(name: str, tmp_path: Path, unprofiled: None) -> None:
    limits = _saved(name, tmp_path / "model", "minimal")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, overflow=limits)
    attachment = overflowml.attachment(model)
    assert attachment.plan.strategy == "experts int8"
    assert attachment.plan.quality == "minimal"
    assert {p.format for p in attachment.plan.placements() if p.experts_home is not None} == {"int8"}
    # In bfloat16 a tiny model rounds by more than a format changes; in float32 nothing but the values of its experts counts.
    exact = _logits(with_decoded_experts(plain, "int8").float())
    # A token whose router chooses between two equals may go to another expert; most do not.
    errors = (_logits(model) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.median() < 0.06
    assert not torch.equal(_logits(model), _logits(plain))
    assert type(model.model.layers[0].self_attn.q_proj.weight.data) is torch.Tensor
    report = attachment.expert_report()
    (phase,) = attachment.plan.phases
    assert report.slots == phase.expert_cache_bytes // report.slot_bytes
    assert report.banks[0].expert_bytes < report.slot_bytes
    assert_same_weights(model, plain, managed=True)
    model.save_pretrained(tmp_path / "again")
    overflowml.release(model)
    assert_same_weights(model, plain)
    assert torch.equal(_logits(model), _logits(plain))
    assert_same_weights(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16), plain)


def test_experts_are_as_stored_without_that(tmp_path: Path, unprofiled: None) -> None:
    limits = _saved("qwen3_moe", tmp_path, "lossless")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, overflow=limits)
    plan = overflowml.attachment(model).plan
    assert plan.strategy == "experts"
    assert {r.strategy: r.carried_out for r in plan.rejected}["experts int8"]
    overflowml.release(model)
