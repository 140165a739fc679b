"""Every family of diffusers pipelines gives the host's own bits: loaded by us, managed alive, and given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

import overflowml
from tests.hosts import pipelines
from tests.hosts.check import assert_same, assert_same_weights, smallest

Saved = Callable[..., Path]
_REFERENCES: dict[Path, torch.Tensor] = {}


def _expected(name: str, folder: Path) -> torch.Tensor:
    if folder not in _REFERENCES:
        _REFERENCES[folder] = pipelines.run(name, _class(folder).from_pretrained(folder, **pipelines.without_tokenizers(name)))
    return _REFERENCES[folder]


def _class(folder: Path) -> Any:
    return getattr(df, df.DiffusionPipeline.load_config(folder)["_class_name"])


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_streamed_pipeline_gives_the_hosts_bits(name: str, saved_pipeline: Saved) -> None:
    folder = saved_pipeline(name)
    expected, options = _expected(name, folder), pipelines.without_tokenizers(name)
    limits = smallest(folder, **options)
    pipe = df.DiffusionPipeline.from_pretrained(folder, overflow=limits, **options)
    assert type(pipe) is _class(folder)
    attached = overflowml.attachment(pipe)
    assert attached is not None
    assert attached.plan.strategy == "stream"
    assert_same(pipelines.run(name, pipe), expected)
    assert_same(pipelines.run(name, pipe), expected)
    assert attached.report().device_peak_bytes <= attached.plan.budget.device_bytes

    theirs = _class(folder).from_pretrained(folder, **options)
    pipelines.run(name, theirs)  # a run leaves attributes of its own
    assert overflowml.release(pipe)
    for part, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            assert_same_weights(pipe.components[part], module)
            assert not hasattr(pipe.components[part], "_hf_hook")
    assert set(vars(pipe)) == set(vars(theirs))


@pytest.mark.parametrize("name", ["flux", "controlnet", "wan", "sdxl"])
def test_pipeline_whose_phases_take_turns_gives_the_hosts_bits(name: str, saved_pipeline: Saved) -> None:
    folder = saved_pipeline(name)
    expected, options = _expected(name, folder), pipelines.without_tokenizers(name)
    network = overflowml.describe(folder, **options)
    largest = max(sum(c.resident_bytes + sum(b.slab_bytes for b in c.blocks) for c in components) for _, components in network.phases())
    pipe = df.DiffusionPipeline.from_pretrained(folder, overflow=overflowml.Limits.exactly(device_memory=largest, reserve=0), **options)
    attached = overflowml.attachment(pipe)
    assert attached is not None
    assert attached.plan.strategy == "phased"
    assert_same(pipelines.run(name, pipe), expected)


@pytest.mark.parametrize("name", ["flux", "stable_diffusion", "wan"])
def test_live_pipeline_is_managed_and_given_back(name: str, saved_pipeline: Saved) -> None:
    folder = saved_pipeline(name)
    options = pipelines.without_tokenizers(name)
    pipe = _class(folder).from_pretrained(folder, **options)
    expected = pipelines.run(name, pipe)
    before = {part: dict(m.named_parameters()) for part, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    attributes = set(vars(pipe))
    attached = overflowml.manage(pipe, smallest(folder, **options))
    assert attached.plan.fingerprint == overflowml.plan(folder, overflow=smallest(folder, **options), **options).fingerprint
    assert_same(pipelines.run(name, pipe), expected)
    assert overflowml.release(pipe)
    assert_same(pipelines.run(name, pipe), expected)
    assert set(vars(pipe)) == attributes
    for part, parameters in before.items():
        after = dict(pipe.components[part].named_parameters())
        assert all(after[path] is parameters[path] for path in parameters)
    pipe.to(torch.float64)


def test_controlnet_shares_the_phase_of_its_unet(saved_pipeline: Saved) -> None:
    network = overflowml.describe(saved_pipeline("controlnet"), **pipelines.without_tokenizers("controlnet"))
    assert [(phase, [c.name for c in components]) for phase, components in network.phases()] == [
        ("text_encoder", ["text_encoder"]),
        ("unet", ["controlnet", "unet"]),
        ("vae", ["vae"]),
    ]


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_everything_fits(name: str, saved_pipeline: Saved) -> None:
    """A direct plan hooks nothing and guards nothing: the pipeline is the host's own."""
    folder = saved_pipeline(name)
    options = pipelines.without_tokenizers(name)
    pipe = _class(folder).from_pretrained(folder, overflow="8GB", **options)
    attached = overflowml.attachment(pipe)
    assert attached is not None
    assert attached.plan.strategy == "direct"
    assert_same(pipelines.run(name, pipe), _expected(name, folder))
    pipe.to("cpu")
