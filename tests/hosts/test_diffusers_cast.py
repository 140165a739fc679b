"""Pipelines that cast a component while they run: SDXL loads its VAE in float16 and decodes in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

import overflowml
from overflowml_core.errors import Managed
from tests.hosts import pipelines
from tests.hosts.check import assert_same, assert_same_weights, smallest

Saved = Callable[..., Path]
HALF = torch.float16
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def _load(folder: Path, **options: Any) -> Any:
    return df.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=HALF, **pipelines.without_tokenizers("sdxl"), **options)


def _limits(folder: Path, room_bytes: int = 0) -> overflowml.Limits:
    least = smallest(folder, torch_dtype=HALF, **pipelines.without_tokenizers("sdxl"))
    return overflowml.Limits.exactly(device_memory=least.device_bytes + room_bytes, reserve=0)


@pytest.fixture
def sdxl(saved_pipeline: Saved) -> Path:
    return saved_pipeline("sdxl")


def _run(pipe: Any) -> torch.Tensor:
    assert pipe.vae.config.force_upcast
    return pipelines.run("sdxl", pipe)


def test_a_vae_is_decoded_in_float32_and_cast_back(sdxl):
    plain = _load(sdxl)
    expected = _run(plain)
    pipe = _load(sdxl, overflow=_limits(sdxl, 200_000))
    assert overflowml.attachment(pipe).plan.strategy == "stream"
    for _ in range(2):
        assert_same(_run(pipe), expected)
        assert pipe.vae.dtype is HALF
    overflowml.release(pipe)
    assert_same_weights(pipe.vae, plain.vae)
    assert_same(_run(pipe), expected)


def test_a_live_pipeline_is_given_back_in_its_own_dtype(sdxl):
    plain, pipe = _load(sdxl), _load(sdxl)
    before = list(pipe.vae.parameters())
    assert overflowml.manage(pipe, _limits(sdxl, 200_000)).plan.strategy == "stream"
    pipe.vae.to(dtype=torch.float32)
    assert pipe.vae.dtype is torch.float32
    assert all(torch.equal(mine, theirs.float()) for mine, theirs in zip(pipe.vae.parameters(), plain.vae.parameters(), strict=True))
    overflowml.release(pipe)
    assert all(mine is theirs for mine, theirs in zip(pipe.vae.parameters(), before, strict=True))
    assert_same_weights(pipe.vae, plain.vae)


def test_a_cast_over_the_budget_is_refused_and_changes_nothing(sdxl):
    pipe = _load(sdxl, overflow=_limits(sdxl))
    part = max(("vae", "unet", "text_encoder"), key=lambda name: sum(p.numel() for p in getattr(pipe, name).parameters()))
    module = getattr(pipe, part)
    values = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(overflowml.DoesNotFit, match=rf"{part}: in torch.float64 it takes \d+ bytes.*give overflow='"):
        module.to(dtype=torch.float64)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(module.parameters(), values, strict=True))
    assert module.dtype is HALF


def test_a_streamed_component_is_cast_too(sdxl):
    plain = _load(sdxl)
    for part in PARTS:
        getattr(plain, part).to(torch.bfloat16)
    expected = pipelines.run("sdxl", plain)
    pipe = _load(sdxl, overflow=_limits(sdxl))
    assert overflowml.attachment(pipe).plan.phase_of("unet").streamed
    for part in PARTS:
        getattr(pipe, part).to(torch.bfloat16)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True))
    assert_same(pipelines.run("sdxl", pipe), expected)
    overflowml.release(pipe)
    assert pipe.unet.dtype is HALF


def test_a_move_is_still_refused(sdxl):
    pipe = _load(sdxl, overflow=_limits(sdxl))
    with pytest.raises(Managed):
        pipe.vae.to("meta", torch.float32)
