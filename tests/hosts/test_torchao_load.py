"""Models quantized while they load: the same numbers as torchao gives on the loaded model, from the plan that was shown before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
import transformers as tf

import overflowml
import overflowml_torchao
from overflowml_core import session
from overflowml_core.facts import Tier
from tests.hosts import models, pipelines
from tests.hosts.check import assert_same, assert_same_weights

quantization = pytest.importorskip("torchao.quantization")

Saved = Callable[..., Path]
OTHER = {"int8": "fp8", "fp8": "int8"}


@pytest.fixture(autouse=True)
def fast_formats(hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's formats, on a machine where decoding costs nothing: then they are what a small budget asks for."""
    monkeypatch.setattr(overflowml_torchao, "CPU_DECODE_BYTES_PER_S", {"fp8": 1e18, "int8": 1e18})
    if "torchao" not in session.plugins().names():
        session.plugins().register(overflowml_torchao, "torchao")


def limits(nbytes: int, form: str, **changes: Any) -> overflowml.Limits:
    barred = frozenset({(OTHER[form], "*")})
    return overflowml.Limits.exactly(device_memory=nbytes, reserve=0, **{"quality": "minimal", "excluded": barred, **changes})


def converted(module: torch.nn.Module) -> set[str]:
    """Names of the layers whose weights torchao holds."""
    return {name for name, inner in module.named_modules() if hasattr(getattr(inner, "weight", None), "__tensor_flatten__")}


def by_torchao(module: torch.nn.Module, form: str, names: set[str]) -> torch.nn.Module:
    config = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}[form]
    quantization.quantize_(module, config(set_inductor_config=False), filter_fn=lambda _, name: name in names)
    return module


def least_bytes(source: Any, form: str, **options: Any) -> int:
    """The smallest budget in a format: what is outside the blocks, and a slot for the largest of these."""
    plan = overflowml.plan(source, overflow=limits(2**40, form, excluded=frozenset()), **options)
    network = overflowml.describe(source, **options)
    chosen = next(one for one in session.plugins().formats(session.detect()) if one.name == form)
    from overflowml_core.planner.conversion import weigh

    assert plan.kind == "direct"
    return max(c.resident_bytes + max((weigh(b, chosen).slab_bytes for b in c.blocks), default=0) for c in network.components)


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(("form", "more"), [("int8", 0), ("int8", 9000), ("fp8", 4096)])
def test_a_language_model(form: str, more: int, saved: Saved) -> None:
    folder = saved("llama")
    asked = limits(least_bytes(folder, form) + more, form)
    shown = overflowml.plan(folder, overflow=asked)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=asked)
    plan = overflowml.attachment(model).plan
    assert plan.fingerprint == shown.fingerprint
    assert (plan.formats, plan.quality, plan.kind) == ((form,), "minimal", "stream")
    assert {p.home for p in plan.placements()} <= {Tier.DISK, Tier.DEVICE}
    names = converted(model)
    assert names == {f"model.layers.{i}.{name}" for i in range(4) for name in LINEARS}
    plain = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert_same_weights(model, plain, managed=True)
    theirs = by_torchao(tf.AutoModelForCausalLM.from_pretrained(folder), form, names)
    assert_same(models.call("llama", model), models.call("llama", theirs))
    assert_same(models.generate(model), models.generate(theirs))
    overflowml.release(model)
    assert_same_weights(model, plain)
    assert not converted(model)
    assert_same(models.call("llama", model), models.call("llama", plain))


def test_a_diffusion_transformer(saved_pipeline: Saved) -> None:
    form = "fp8"
    folder = saved_pipeline("flux") / "transformer"
    asked = limits(least_bytes(folder, form), form)
    model = df.FluxTransformer2DModel.from_pretrained(folder, overflow=asked)
    assert overflowml.attachment(model).plan.fingerprint == overflowml.plan(folder, overflow=asked).fingerprint
    names = converted(model)
    assert {name.partition(".")[0] for name in names} == {"transformer_blocks", "single_transformer_blocks"}
    plain = df.FluxTransformer2DModel.from_pretrained(folder)
    assert_same_weights(model, plain, managed=True)
    inside = {
        name
        for name, inner in plain.named_modules()
        if isinstance(inner, torch.nn.Linear) and name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    }
    assert names == inside
    pipe = pipelines.build("flux")
    outputs = []
    for transformer in (model, by_torchao(plain, form, names)):
        pipe.register_modules(transformer=transformer)
        outputs.append(pipelines.run("flux", pipe))
    assert_same(*outputs)


def test_a_whole_pipeline(saved_pipeline: Saved) -> None:
    folder, absent = saved_pipeline("flux"), pipelines.without_tokenizers("flux")
    asked = limits(least_bytes(folder, "int8", **absent), "int8")
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=asked, **absent)
    plan = overflowml.attachment(pipe).plan
    assert plan.formats == ("int8",)
    plain = df.FluxPipeline.from_pretrained(folder, **absent)
    for name, part in plain.components.items():
        if isinstance(part, torch.nn.Module):
            assert_same_weights(getattr(pipe, name), part, managed=True)
            by_torchao(part, "int8", converted(getattr(pipe, name)))
    assert converted(pipe.transformer)
    assert_same(pipelines.run("flux", pipe), pipelines.run("flux", plain))
    overflowml.release(pipe)
    assert not any(converted(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))


def test_saving_a_managed_model_saves_the_true_weights(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=limits(least_bytes(folder, "int8"), "int8"))
    assert converted(model)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tf.AutoModelForCausalLM.from_pretrained(folder), managed=True
    )


def test_a_live_model_keeps_its_own_weights_beside(saved: Saved) -> None:
    folder = saved("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    session.manage(model, limits(least_bytes(model, "fp8"), "fp8"))
    names = converted(model)
    assert names
    assert_same(
        models.call("llama", model), models.call("llama", by_torchao(tf.AutoModelForCausalLM.from_pretrained(folder), "fp8", names))
    )
    assert_same_weights(model, plain, managed=True)
    overflowml.release(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert_same_weights(model, plain)


def test_what_the_model_wants_in_float32_is_left_alone(saved: Saved) -> None:
    folder = saved("t5")
    model = tf.T5ForConditionalGeneration.from_pretrained(folder, overflow=limits(least_bytes(folder, "int8"), "int8"))
    names = converted(model)
    assert any(name.endswith(".wi") for name in names)
    assert not any(name.endswith((".wo", "lm_head", "shared")) for name in names)


@pytest.mark.parametrize("quality", [None, "lossless"])
def test_nothing_is_changed_unasked(quality: str | None, saved: Saved) -> None:
    folder = saved("llama")
    nbytes = least_bytes(folder, "fp8") + 30_000
    asked = overflowml.Limits.exactly(device_memory=nbytes, reserve=0, quality=quality)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=asked)
    plan = overflowml.attachment(model).plan
    assert (plan.formats, plan.quality, plan.limits.quality) == ((), "lossless", "lossless")
    assert not converted(model)
    told = {r.strategy: r for r in plan.rejected}
    for form in ("fp8", "int8"):
        (way,) = [r for name, r in told.items() if name.endswith(form) and r.viable]
        assert way.carried_out
        assert "quality='minimal' would" in way.reason
        assert "faster" in way.reason or "moves" in way.reason
    assert_same(models.call("llama", model), models.call("llama", tf.AutoModelForCausalLM.from_pretrained(folder)))


def test_an_excluded_format_is_not_used(saved: Saved) -> None:
    folder = saved("llama")
    asked = limits(least_bytes(folder, "int8") + 30_000, "int8", excluded=frozenset({("int8", "*"), ("fp8", "*")}))
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=asked)
    assert overflowml.attachment(model).plan.formats == ()
    assert not converted(model)


def test_without_torchao_a_plan_says_what_is_missing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    asked = overflowml.Limits.exactly(device_memory=least_bytes(folder, "int8") + 30_000, reserve=0, quality="minimal")
    monkeypatch.setattr(overflowml_torchao.importlib.util, "find_spec", lambda name: None)
    plan = overflowml.plan(folder, overflow=asked)
    assert plan.formats == ()
    named = [r for r in plan.rejected if r.strategy.endswith("int8") and r.viable]
    assert named
    assert not any(r.carried_out for r in named)
    assert all("pip install" in r.reason for r in named)
