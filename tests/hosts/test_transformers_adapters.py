"""Adapters, resized vocabularies, caches and compiled blocks of managed transformers models; training is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch._dynamo.utils import counters

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

import overflowml
from tests.hosts import models
from tests.hosts.check import assert_same, assert_same_weights, whole_blocks

Saved = Callable[..., Path]
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def pair(name: str, folder: Path, room_bytes: int = 30_000) -> tuple[Any, Any]:
    """A model and a managed one."""
    load = getattr(tf, models.FAMILIES[name].model).from_pretrained
    return load(folder), load(folder, overflow=whole_blocks(folder, room_bytes))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    get_peft_model(models.build("llama"), CONFIG).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(models.TOKENS).logits


def test_the_hosts_own_adapters(adapter: Path, saved: Saved) -> None:
    theirs, ours = pair("llama", saved("llama"))
    plain = logits(theirs)
    for model in (theirs, ours):
        model.load_adapter(str(adapter))
    assert not torch.equal(logits(theirs), plain)
    assert_same(logits(ours), logits(theirs))
    assert_same(models.generate(ours), models.generate(theirs))
    ours.disable_adapters()
    assert_same(logits(ours), plain)
    ours.enable_adapters()
    assert_same(logits(ours), logits(theirs))
    ours.delete_adapter("default")
    assert_same(logits(ours), plain)
    assert next(iter(ours.hf_device_map.items())) == ("", "cpu")


def test_a_new_adapter_on_a_managed_model(saved: Saved) -> None:
    theirs, ours = pair("llama", saved("llama"))
    for model in (theirs, ours):
        torch.manual_seed(6)
        model.add_adapter(CONFIG)
    assert_same(logits(ours), logits(theirs))


def test_pefts_own_model_around_a_managed_one(adapter: Path, saved: Saved) -> None:
    models_of = pair("llama", saved("llama"))
    theirs, ours = (PeftModel.from_pretrained(model, str(adapter)) for model in models_of)
    assert_same(logits(ours), logits(theirs))
    assert_same(models.generate(ours), models.generate(theirs))
    for step in ("merge_adapter", "unmerge_adapter"):
        for model in (theirs, ours):
            getattr(model, step)()
        assert_same(logits(ours), logits(theirs))
    merged = [model.merge_and_unload() for model in (theirs, ours)]
    assert merged[1] is models_of[1]
    assert_same(logits(merged[1]), logits(merged[0]))
    overflowml.release(merged[1])
    assert_same_weights(merged[1], merged[0])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "t5"])
def test_a_resized_vocabulary(name: str, saved: Saved) -> None:
    theirs, ours = pair(name, saved(name), room_bytes=90_000)
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(140)
    assert_same(models.call(name, ours).logits, models.call(name, theirs).logits)
    overflowml.release(ours)
    assert_same(models.call(name, ours).logits, models.call(name, theirs).logits)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generating_with_other_caches_and_beams(name: str, options: dict[str, Any], saved: Saved) -> None:
    theirs, ours = pair(name, saved(name), room_bytes=0)
    assert_same(models.generate(ours, **options), models.generate(theirs, **options))


def test_blocks_compiled_from_outside(saved: Saved) -> None:
    theirs, ours = pair("llama", saved("llama"), room_bytes=0)
    expected = logits(theirs)
    torch._dynamo.reset()
    counters.clear()
    for k, block in enumerate(ours.model.layers):
        ours.model.layers[k] = torch.compile(block, backend="eager")
    assert_same(logits(ours), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(2):
        assert_same(logits(ours), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_training_is_refused_where_the_loss_would_be_computed(saved: Saved) -> None:
    theirs, ours = pair("llama", saved("llama"), room_bytes=0)
    ours.train()
    with pytest.raises(overflowml.OverflowmlError, match=r"training mode.*model\.eval\(\).*overflowml\.release"):
        ours(models.TOKENS, labels=models.TOKENS)
    ours.eval()
    assert_same(ours(models.TOKENS).logits, logits(theirs))
