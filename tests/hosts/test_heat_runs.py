"""A mixture of experts at work leaves a heat map, and the next load starts from it: same fingerprint, same outputs, a warm cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from overflowml_core import session
from overflowml_core.facts import Limits, Workload
from overflowml_core.heat_store import load_heat
from overflowml_core.plan import Plan

LIMITS = Limits("1300KB", None, "100KB", quality="lossless", trial=False)
TOKENS = torch.tensor([[5, 17, 42, 3, 88, 61, 20, 9]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128, num_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config).eval()


def plan_of(model: Any) -> Plan:
    """The plan with experts apart, whatever else would be faster."""
    machine = session.detect()
    abilities = session.abilities_of(False) | {"experts"}
    plan = session.plugins().plan(session.describe(model), machine, Workload(), LIMITS, (), abilities)
    assert plan.kind == "experts"
    return plan


def test_what_a_run_counted_is_what_the_next_one_starts_from(model: Any) -> None:
    cold = session.describe(model)
    expected = model(TOKENS).logits
    made: Any = session.manage(model, LIMITS, plan=plan_of(model))
    assert torch.equal(model(TOKENS).logits, expected)
    counted = made.expert_report()
    assert session.release(model)
    heat = load_heat(cold.fingerprint)
    assert heat is not None
    assert [one.report for one in heat.runs] == [counted]
    assert [sum(bank.counts) for bank in heat.banks] == [TOKENS.numel() * 2] * 3

    warm = session.describe(model)
    assert warm.fingerprint == cold.fingerprint
    for block in warm.components[0].blocks:
        assert sum(block.experts.heat) == pytest.approx(2)
        assert block.experts.heat == heat.shares("model", block.name)
    again: Any = session.manage(model, LIMITS, plan=plan_of(model))
    assert torch.equal(model(TOKENS).logits, expected)
    session.release(model)
    heat = load_heat(cold.fingerprint)
    assert len(heat.runs) == 2
    assert [sum(bank.counts) for bank in heat.banks] == [TOKENS.numel() * 4] * 3
    assert again.expert_report().tokens == TOKENS.numel()


def test_a_damaged_map_has_the_model_run_cold(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fingerprint = session.describe(model).fingerprint
    path = tmp_path / "cache" / "heat" / f"{fingerprint}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "banks": "none"}')
    expected = model(TOKENS).logits
    session.manage(model, LIMITS, plan=plan_of(model))
    assert torch.equal(model(TOKENS).logits, expected)
    session.release(model)
    assert str(path) in caplog.text
    assert load_heat(fingerprint).runs[0].report.tokens == TOKENS.numel()
