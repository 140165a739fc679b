"""The names that scripts know: optimize_pipeline and optimize_model plan, carry out, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import overflowml
from overflowml_core import description, session
from overflowml_core.errors import BadSize
from tests.hosts import models, pipelines
from tests.hosts.check import assert_same


def test_a_model_under_a_budget_gives_the_same_and_is_given_back() -> None:
    model = models.build("llama")
    expected = models.call("llama", model)
    made = overflowml.optimize_model(model, overflow=overflowml.Limits.exactly(device_memory=100_000, reserve=0))
    assert "LlamaForCausalLM" in made.summary()
    assert made.plan.kind in ("stream", "sequential")
    assert_same(models.call("llama", model), expected)
    assert overflowml.release(model)


def test_a_pipeline_needs_no_size() -> None:
    pipe = pipelines.build("stable_diffusion")
    expected = pipelines.run("stable_diffusion", pipe)
    made = overflowml.optimize_pipeline(pipe)
    assert made.plan.network == "StableDiffusionPipeline"
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    assert overflowml.attachment(pipe) is made


@pytest.mark.parametrize(("size", "warned"), [(0.00025, True), (14, True), ("14", True), (None, False)])
def test_a_size_that_is_off_is_said(size: Any, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    if size == 0.00025:
        size = models.build("llama").num_parameters() * 4 * 3 / 1e9  # three times what it takes
    overflowml.optimize_model(models.build("llama"), size)
    assert ("model_size_gb" in caplog.text) is warned


@pytest.mark.parametrize("size", [float("nan"), -1, 0, "forty", float("inf")])
def test_a_size_that_is_none_is_an_error(size: Any) -> None:
    model = models.build("llama")
    with pytest.raises(BadSize, match="model_size_gb"):
        overflowml.optimize_model(model, size)
    assert overflowml.attachment(model) is None


def test_a_live_model_is_profiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(description, "_profiles", lambda: description.ProfileCache(tmp_path))
    seen: list[object] = []
    measure: Callable[..., Any] = session.plugins().measure
    monkeypatch.setattr(session.plugins(), "measure", lambda *args: seen.append(args[0]) or measure(*args))
    first = overflowml.describe(models.build("llama"))
    again = overflowml.describe(models.build("llama"))
    assert len(seen) == 1
    assert again == first
    assert first.components[0].activation_source == "traced"
    other = models.build("llama")
    other.config._name_or_path = "somewhere else"
    assert overflowml.describe(other).components == first.components
    assert len(seen) == 1
    overflowml.describe(other, overflowml.Workload(prompt_tokens=7))
    assert len(seen) == 2


def test_a_folder_and_the_live_model_have_the_same_profile(saved: Callable[..., Path]) -> None:
    folder = overflowml.describe(saved("qwen3"))
    live = overflowml.describe(models.build("qwen3"))
    assert folder.components == live.components
