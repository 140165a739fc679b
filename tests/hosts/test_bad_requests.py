"""Senseless requests, budgets that are too small, and faults after the plan: clear errors, and nothing left behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
import transformers as tf

import overflowml
from overflowml_core.errors import BadLimits, BadSize, DoesNotFit, OverflowmlError
from tests.hosts import models, pipelines
from tests.hosts.check import assert_one_line, assert_same, copy_folder, smallest

Saved = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")
_NO_TOKENS = pipelines.without_tokenizers("flux")
_EXACT = overflowml.Limits.exactly(device_memory=100_000, reserve=0)


# ---- requests


@pytest.mark.parametrize(
    "request_", ["lots", "-1", "0", "0GB", "-8GB", "8", "8 parsecs", "", "True", "auto", -1, 0, 8, 2**61, "nanGB", "1e9GB", "9" * 30 + "GB"]
)
def test_size_that_cannot_be_read(request_: object, saved: Saved, saved_pipeline: Saved) -> None:
    for ask in (
        lambda: overflowml.plan(saved("llama"), overflow=request_),
        lambda: tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=request_),
        lambda: df.FluxPipeline.from_pretrained(saved_pipeline("flux"), overflow=request_, **_NO_TOKENS),
        lambda: df.FluxTransformer2DModel.from_pretrained(saved_pipeline("flux") / "transformer", overflow=request_),
    ):
        with pytest.raises(BadSize) as caught:
            ask()
        assert_one_line(caught.value, repr(request_), "8GB")


@pytest.mark.parametrize("request_", [1.5, float("nan"), [], ["8GB"], (), b"8GB", object(), {"memory": "8GB"}, {"quality": "best"}])
def test_request_of_another_kind(request_: object, saved: Saved, saved_pipeline: Saved) -> None:
    for ask in (
        lambda: overflowml.plan(saved("llama"), overflow=request_),
        lambda: tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=request_),
        lambda: df.FluxPipeline.from_pretrained(saved_pipeline("flux"), overflow=request_, **_NO_TOKENS),
        lambda: overflowml.manage(torch.nn.Linear(2, 2), overflow=request_),
    ):
        with pytest.raises(BadLimits) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that sizes in whole megabytes mean something."""
    folder = tmp_path_factory.mktemp("medium")
    config = tf.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("overflow", ["2MB", {"device_memory": "3MB", "reserve": "1MB"}])
def test_budget_below_the_smallest_plan_names_one_that_works(overflow: Any, medium: Path) -> None:
    texts: list[str] = []
    for ask in (
        lambda: overflowml.plan(medium, overflow=overflow),
        lambda: tf.AutoModelForCausalLM.from_pretrained(medium, overflow=overflow),
        lambda: overflowml.manage(tf.AutoModelForCausalLM.from_pretrained(medium), overflow=overflow),
    ):
        with pytest.raises(DoesNotFit) as caught:
            ask()
        assert_one_line(caught.value, "short")
        assert caught.value.near_misses[0].short_bytes > 0
        texts.append(str(caught.value))
    assert len(set(texts)) == 1
    size = re.search(r"overflow='(\w+)'", texts[0])
    assert size is not None, texts[0]
    request = {**overflow, "device_memory": size[1]} if isinstance(overflow, dict) else size[1]
    model = tf.AutoModelForCausalLM.from_pretrained(medium, overflow=request)
    attached = overflowml.attachment(model)
    assert attached is not None
    assert attached.plan.strategy == "stream"
    overflowml.release(model)


def test_exact_smallest_budget_works_and_one_byte_less_does_not(saved: Saved, saved_pipeline: Saved) -> None:
    for folder, options in ((saved("llama"), {}), (saved_pipeline("flux"), _NO_TOKENS)):
        enough = smallest(folder, **options).device_bytes
        assert enough is not None
        overflowml.plan(folder, overflow=overflowml.Limits.exactly(device_memory=enough, reserve=0), **options)
        with pytest.raises(DoesNotFit) as caught:
            overflowml.plan(folder, overflow=overflowml.Limits.exactly(device_memory=enough - 1, reserve=0), **options)
        assert caught.value.near_misses[0].short_bytes == 1


def test_budget_without_the_disk(saved: Saved) -> None:
    with pytest.raises(DoesNotFit, match="allow_disk=True") as caught:
        tf.AutoModelForCausalLM.from_pretrained(
            saved("llama"), overflow=overflowml.Limits.exactly(device_memory=100_000, reserve=0, allow_disk=False)
        )
    assert_one_line(caught.value)


# ---- faults after the plan


def test_file_that_is_cut_while_the_model_runs(saved: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved("llama"), tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=_EXACT)
    models.call("llama", model)
    weights = folder / "model.safetensors"
    whole, before = weights.read_bytes(), weights.stat()
    with weights.open("r+b") as opened:
        opened.truncate(len(whole) // 2)
    try:
        with pytest.raises(OverflowmlError) as caught:
            models.call("llama", model)
        assert_one_line(caught.value, "model.safetensors")
    finally:
        with weights.open("r+b") as opened:
            opened.write(whole)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_same(models.call("llama", model), models.call("llama", tf.AutoModelForCausalLM.from_pretrained(folder)))
    overflowml.release(model)


def test_failure_while_weights_are_brought_in(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from overflowml_core.runtime import rearrange

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(rearrange, "home_on_disk", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=_EXACT)
        live = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
        expected = models.call("llama", live)
        attributes = {name: set(vars(module)) for name, module in live.named_modules()}
        with pytest.raises(RuntimeError, match="no luck"):
            overflowml.manage(live, _EXACT)
    assert overflowml.attachment(live) is None
    assert {name: set(vars(module)) for name, module in live.named_modules()} == attributes
    assert_same(models.call("llama", live), expected)


def test_plugin_that_fails_after_the_attachment(saved_pipeline: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from overflowml_diffusers import attach

    pipe = df.FluxPipeline.from_pretrained(saved_pipeline("flux"), **_NO_TOKENS)
    expected = pipelines.run("flux", pipe)
    attributes = {part: set(vars(m)) for part, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    with monkeypatch.context() as patched:
        real, calls = attach._place, []

        def place(module: Any, placement: Any) -> Any:
            calls.append(module)
            if len(calls) == 3:
                raise RuntimeError("no luck")
            return real(module, placement)

        patched.setattr(attach, "_place", place)
        with pytest.raises(OverflowmlError, match="no luck"):
            overflowml.manage(pipe, smallest(pipe))
    assert {part: set(vars(pipe.components[part])) for part in attributes} == attributes
    assert_same(pipelines.run("flux", pipe), expected)
