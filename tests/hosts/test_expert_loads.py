"""``from_pretrained(..., overflow=...)`` of models with routed experts under a budget that keeps them apart: only dense parts are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import overflowml
from tests.hosts.check import assert_same, assert_same_weights
from tests.hosts.moe_models import MASK, PADDED, TOKENS, build

NAMES = ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"]


def _saved(name: str, folder: Path) -> tuple[Path, overflowml.Limits]:
    """A model's folder, and a budget that holds its dense parts and about half of its experts."""
    model = build(name)
    model.save_pretrained(folder)
    experts = sum(p.nbytes for path, p in model.named_parameters() if ".experts." in path)
    whole = sum(p.nbytes for p in model.parameters())
    return folder, overflowml.Limits.exactly(device_memory=whole - experts // 3, reserve=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_keeps_its_experts_apart(name, tmp_path, unprofiled):
    folder, limits = _saved(name, tmp_path / "model")
    plain = tf.AutoModelForCausalLM.from_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=limits)
    attachment = overflowml.attachment(model)
    assert attachment is not None
    assert attachment.plan.strategy == "experts"
    assert model.get_experts_implementation() == {"": "overflowml"}
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = (one(PADDED, attention_mask=MASK).logits for one in (model, plain))
            if name == "gpt_oss":  # rounds by how many tokens an expert is given at once
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            else:
                assert_same(ours, theirs)
        made = [one.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False) for one in (model, plain)]
    assert_same(made[0], made[1])
    assert_same_weights(model, plain, managed=True)
    model.save_pretrained(tmp_path / "again")
    overflowml.release(model)
    assert model.get_experts_implementation() == plain.get_experts_implementation()
    assert_same_weights(model, plain)
    assert_same_weights(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), plain)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_the_implementation_that_was_asked_for_comes_back(implementation, tmp_path, unprofiled):
    folder, limits = _saved("mixtral", tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, overflow=limits)
    assert model.get_experts_implementation() == {"": "overflowml"}
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)
    overflowml.release(model)
    assert model.get_experts_implementation() == {"": implementation}
    assert_same(model(TOKENS).logits, plain(TOKENS).logits)


def _pack_experts(folder: Path) -> None:
    """Make a gpt-oss checkpoint one with experts in MXFP4: blocks of 32 values of four bits, with a scale each."""
    tensors = load_file(folder / "model.safetensors")
    source = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        shape = (count, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=source, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, generator=source, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": dense}
    (folder / "config.json").write_text(json.dumps(config))


def test_packed_experts_that_the_host_decodes_as_it_loads_them(tmp_path, unprofiled):
    build("gpt_oss", torch.bfloat16, intermediate_size=32).save_pretrained(tmp_path)
    _pack_experts(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    limits = overflowml.Limits.exactly(device_memory=sum(p.nbytes for p in plain.parameters()) * 2 // 3, reserve=0)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, overflow=limits)
    assert overflowml.attachment(model).plan.strategy == "experts"
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-2, atol=1e-3)
    overflowml.release(model)
    assert_same_weights(model, plain)


def test_uninstalling_takes_the_implementation_out_of_the_host():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "overflowml" in ALL_EXPERTS_FUNCTIONS
    overflowml.uninstall()
    assert "overflowml" not in ALL_EXPERTS_FUNCTIONS
    overflowml.install()
    assert "overflowml" in ALL_EXPERTS_FUNCTIONS


def test_experts_that_ram_has_no_room_for_stay_unread_when_the_model_is_released(tmp_path, unprofiled, monkeypatch, caplog):
    folder, limits = _saved("qwen3_moe", tmp_path / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=limits)
    attachment = overflowml.attachment(model)
    unread_bytes = attachment.experts.unread_bytes
    assert unread_bytes > 0
    machine = overflowml.detect()
    small = dataclasses.replace(machine, host=dataclasses.replace(machine.host, available_bytes=unread_bytes * 10 // 9 // 2))
    monkeypatch.setattr("overflowml_core.session.detect", lambda: small)
    assert overflowml.release(model)
    assert "of experts stay unread" in caplog.text
    left = sum(p.nbytes for p in model.parameters() if p.is_meta)
    assert 0 < left < unread_bytes
