"""Every family of transformers models gives the host's own bits: loaded by us, managed alive, and given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf

import overflowml
from overflowml_core.facts import Tier
from tests.hosts import models
from tests.hosts.check import assert_same, assert_same_weights, smallest

Saved = Callable[..., Path]
_BFLOAT16 = ("llama_tied", "t5", "deepseek_v3", "qwen3_moe", "whisper")


def _load(name: str, folder: Path, **options: object) -> tf.PreTrainedModel:
    return getattr(tf, models.FAMILIES[name].model).from_pretrained(folder, **options)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_streamed_family_gives_the_hosts_bits(name: str, saved: Saved) -> None:
    _whole_life(name, saved(name))


@pytest.mark.parametrize("name", _BFLOAT16)
def test_streamed_family_in_bfloat16_gives_the_hosts_bits(name: str, saved: Saved) -> None:
    _whole_life(name, saved(name, torch.bfloat16))


def _whole_life(name: str, folder: Path) -> None:
    theirs = _load(name, folder)
    expected = models.call(name, theirs)
    limits = smallest(folder)

    model = _load(name, folder, overflow=limits)
    attached = overflowml.attachment(model)
    assert attached is not None
    assert attached.plan.strategy == "stream"
    assert all(p.tier is Tier.DISK for p in attached.plan.placements())
    assert_same(models.call(name, model), expected)
    assert_same(models.call(name, model), expected)
    assert_same_weights(model, theirs, managed=True)
    report = attached.report()
    assert report.streamed_bytes > 0
    assert report.device_peak_bytes <= attached.plan.budget.device_bytes

    assert overflowml.release(model)
    assert overflowml.attachment(model) is None
    assert_same_weights(model, theirs)
    assert_same(models.call(name, model), expected)


@pytest.mark.parametrize("name", [name for name, family in models.FAMILIES.items() if family.generates])
def test_streamed_family_generates_the_hosts_tokens(name: str, saved: Saved) -> None:
    folder = saved(name)
    expected = models.generate(_load(name, folder))
    assert_same(models.generate(_load(name, folder, overflow=smallest(folder))), expected)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_live_family_is_managed_and_given_back_with_its_own_parameters(name: str, saved: Saved) -> None:
    folder = saved(name)
    model = _load(name, folder)
    expected = models.call(name, model)
    before = dict(model.named_parameters(remove_duplicate=False))
    attributes = set(vars(model))
    attached = overflowml.manage(model, smallest(folder))
    assert attached.plan.fingerprint == overflowml.plan(folder, overflow=smallest(folder)).fingerprint
    assert_same(models.call(name, model), expected)
    assert overflowml.release(model)
    assert_same(models.call(name, model), expected)
    assert set(vars(model)) == attributes
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[path] is before[path] for path in before)


@pytest.mark.parametrize("name", ["llama", "t5", "clip", "mixtral", "mamba"])
def test_budget_between_smallest_and_everything_keeps_some_blocks(name: str, saved: Saved) -> None:
    folder = saved(name)
    expected = models.call(name, _load(name, folder))
    least = smallest(folder).device_bytes
    assert least is not None
    most = overflowml.describe(folder)
    whole = sum(c.resident_bytes + sum(b.slab_bytes for b in c.blocks) for c in most.components)
    kept: list[int] = []
    for step in range(1, 5):
        blocks_only = frozenset({("strategy", "experts")})  # which keeps every block, whatever the budget is
        limits = overflowml.Limits.exactly(device_memory=least + (whole - least) * step // 4, reserve=0, excluded=blocks_only)
        model = _load(name, folder, overflow=limits)
        attached = overflowml.attachment(model)
        assert attached is not None
        kept.append(sum(p.tier is Tier.DEVICE for p in attached.plan.placements()))
        assert_same(models.call(name, model), expected)
        overflowml.release(model)
    assert kept == sorted(kept)
    assert kept[-1] == len(most.components[0].blocks)


def test_moe_experts_that_are_stacked_at_load_show_their_values(saved: Saved) -> None:
    """Per-expert names in the file, one stacked parameter in the model: no file can be mapped for it."""
    from safetensors import safe_open

    folder = saved("qwen3_moe")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert any(".experts.0." in key for key in opened.keys())  # noqa: SIM118 -- no mapping
    model = _load("qwen3_moe", folder, overflow=smallest(folder))
    stacked = [p for path, p in model.named_parameters() if ".experts." in path]
    assert stacked
    assert all(p.dim() == 3 and not p.is_meta for p in stacked)


def test_persistent_buffers_are_loaded(saved: Saved) -> None:
    folder = saved("deepseek_v3")
    model = _load("deepseek_v3", folder, overflow=smallest(folder))
    biases = [b for path, b in model.named_buffers() if path.endswith("e_score_correction_bias")]
    assert biases
    assert all(b.abs().sum() > 0 for b in biases)
