"""How a transformers model may be saved and asked for: shards, dtypes, ties, subfolders, and what the host returns beside the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import overflowml
from tests.hosts import models
from tests.hosts.check import assert_same, assert_same_weights, copy_folder, smallest

pytestmark = pytest.mark.usefixtures("unprofiled")
Saved = Callable[..., Path]


def _check(cls: Any, folder: Path, name: str = "llama", **options: Any) -> Any:
    """Load with and without us, compare everything; returns our model, still managed."""
    theirs = cls.from_pretrained(folder, **options)
    model = cls.from_pretrained(folder, overflow=smallest(folder, **options), **options)
    assert overflowml.attachment(model) is not None
    assert type(model) is type(theirs)
    assert model.dtype == theirs.dtype
    assert_same_weights(model, theirs, managed=True)
    assert_same(models.call(name, model), models.call(name, theirs))
    return model


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "t5"])
@pytest.mark.parametrize("shard", ["20KB", "60KB"])
def test_sharded_checkpoint(name: str, shard: str, saved: Saved) -> None:
    folder = saved(name, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1
    _check(getattr(tf, models.FAMILIES[name].model), folder, name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", None, torch.float32, torch.bfloat16, torch.float16, "float32"])
def test_dtype(stored: torch.dtype, asked: Any, saved: Saved) -> None:
    _check(tf.AutoModelForCausalLM, saved("llama", stored), dtype=asked)


@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float32])
def test_old_name_of_dtype(asked: torch.dtype, saved: Saved) -> None:
    _check(tf.LlamaForCausalLM, saved("llama", torch.float16), torch_dtype=asked)


def test_weights_that_the_model_keeps_in_float32(saved: Saved) -> None:
    """T5 keeps ``wo`` in float32 where the rest is float16 (``_keep_in_fp32_modules``)."""
    model = _check(tf.T5ForConditionalGeneration, saved("t5"), "t5", dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}


def test_weights_stored_in_several_dtypes(saved: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.to(torch.float16) if "mlp" in k else v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    _check(tf.LlamaForCausalLM, folder, dtype="auto")
    _check(tf.LlamaForCausalLM, folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("different", [False, True])
def test_tied_weights_that_are_there_twice(different: bool, saved: Saved, tmp_path: Path) -> None:
    """The host compares them: equal ones are tied, different ones stay apart. So must ours be."""
    folder = copy_folder(saved("llama_tied"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head + 1 if different else head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = _check(tf.LlamaForCausalLM, folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not different


def test_weights_that_are_missing_are_initialized_as_the_host_does(saved: Saved, tmp_path: Path) -> None:
    """A head that the checkpoint lacks: random in the host too, so only the report and everything else are compared."""
    folder = copy_folder(saved("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["nobody.knows.this"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.manual_seed(5)
    theirs, their_info = tf.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    limits = smallest(folder)
    torch.manual_seed(5)
    model, info = tf.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True, overflow=limits)
    assert info == their_info
    assert info["missing_keys"] == {"lm_head.weight"}
    assert info["unexpected_keys"] == {"nobody.knows.this"}
    assert_same_weights(model, theirs, managed=True)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "deepseek_v3", "mixtral", "clip"])
def test_loading_info(name: str, saved: Saved) -> None:
    folder = saved(name)
    cls = getattr(tf, models.FAMILIES[name].model)
    _, theirs = cls.from_pretrained(folder, output_loading_info=True)
    model, info = cls.from_pretrained(folder, output_loading_info=True, overflow=smallest(folder))
    assert overflowml.attachment(model) is not None
    assert info == theirs


def test_base_model_from_a_checkpoint_with_a_head(saved: Saved) -> None:
    theirs = tf.AutoModel.from_pretrained(saved("llama"))
    model = tf.AutoModel.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    assert type(model) is tf.LlamaModel
    assert_same_weights(model, theirs, managed=True)
    assert_same(models.call("llama", model), models.call("llama", theirs))


def test_model_with_a_head_from_a_base_checkpoint(saved: Saved, tmp_path: Path) -> None:
    tf.LlamaModel.from_pretrained(saved("llama_tied")).save_pretrained(tmp_path)
    limits = overflowml.Limits.exactly(device_memory=100_000, reserve=0)
    theirs = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, overflow=limits)
    assert_same_weights(model, theirs, managed=True)
    assert_same(models.call("llama", model), models.call("llama", theirs))


def test_mismatched_head_is_made_anew_where_the_user_says_so(saved: Saved, tmp_path: Path) -> None:
    tf.ViTForImageClassification.from_pretrained(saved("vit")).save_pretrained(tmp_path)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    torch.manual_seed(5)
    theirs = tf.ViTForImageClassification.from_pretrained(tmp_path, **options)
    torch.manual_seed(5)
    model = tf.ViTForImageClassification.from_pretrained(
        tmp_path, overflow=overflowml.Limits.exactly(device_memory=80_000, reserve=0), **options
    )
    assert_same_weights(model, theirs, managed=True)


def test_mismatched_head_is_the_hosts_error_otherwise(saved: Saved) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        tf.ViTForImageClassification.from_pretrained(saved("vit"), num_labels=7)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        tf.ViTForImageClassification.from_pretrained(saved("vit"), num_labels=7, overflow=True)


def test_subfolder(saved: Saved, tmp_path: Path) -> None:
    copy_folder(saved("llama"), tmp_path / "inner")
    _check(tf.AutoModelForCausalLM, tmp_path, subfolder="inner")


def test_variant(saved: Saved, tmp_path: Path) -> None:
    model = tf.LlamaForCausalLM.from_pretrained(saved("llama", torch.float16))
    model.save_pretrained(tmp_path, variant="fp16")
    _check(tf.LlamaForCausalLM, tmp_path, variant="fp16")


def test_folder_as_text_and_by_keyword(saved: Saved) -> None:
    folder = saved("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=str(folder), overflow=smallest(folder))
    assert overflowml.attachment(model) is not None


def test_config_given_by_the_user(saved: Saved) -> None:
    folder = saved("llama")
    config = tf.AutoConfig.from_pretrained(folder)
    config.rms_norm_eps = 0.5
    _check(tf.AutoModelForCausalLM, folder, config=config)
    _check(tf.LlamaForCausalLM, folder, attn_implementation="eager")


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "offloaded"])
def test_generate_with_caches(cache: str | None, saved: Saved) -> None:
    folder = saved("qwen3")
    options = {} if cache is None else {"cache_implementation": cache}
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("the host's offloaded cache needs an accelerator")
    expected = models.generate(tf.AutoModelForCausalLM.from_pretrained(folder), **options)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=smallest(folder))
    assert_same(models.generate(model, **options), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_other_ways_to_generate(options: dict[str, Any], saved: Saved) -> None:
    folder = saved("llama_tied")
    expected = models.generate(tf.AutoModelForCausalLM.from_pretrained(folder), **options)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=smallest(folder))
    assert_same(models.generate(model, **options), expected)


def test_assisted_generation_with_two_managed_models(saved: Saved) -> None:
    main, small = saved("llama"), saved("llama_tied")
    expected = models.generate(
        tf.AutoModelForCausalLM.from_pretrained(main), assistant_model=tf.AutoModelForCausalLM.from_pretrained(small)
    )
    model = tf.AutoModelForCausalLM.from_pretrained(main, overflow=smallest(main))
    assistant = tf.AutoModelForCausalLM.from_pretrained(small, overflow=smallest(small))
    assert_same(models.generate(model, assistant_model=assistant), expected)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe", "deepseek_v3", "wav2vec2"])
def test_save_pretrained_of_a_managed_model_writes_the_true_weights(name: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(name)
    cls = getattr(tf, models.FAMILIES[name].model)
    model = cls.from_pretrained(folder, overflow=smallest(folder))
    models.call(name, model)
    model.save_pretrained(tmp_path)
    theirs, again = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(theirs) == set(again)
    assert all(torch.equal(theirs[key], again[key]) for key in theirs)
    assert_same_weights(cls.from_pretrained(tmp_path), cls.from_pretrained(folder))
    assert_same(models.call(name, model), models.call(name, cls.from_pretrained(folder)))


def test_save_pretrained_over_the_models_own_folder(saved: Saved, tmp_path: Path) -> None:
    """The weights are mapped from the files that are being replaced."""
    folder = copy_folder(saved("llama"), tmp_path)
    theirs = tf.LlamaForCausalLM.from_pretrained(saved("llama"))
    model = tf.LlamaForCausalLM.from_pretrained(folder, overflow=smallest(folder))
    model.save_pretrained(folder)
    assert_same_weights(tf.LlamaForCausalLM.from_pretrained(folder), theirs)
    assert_same(models.call("llama", model), models.call("llama", theirs))


def test_load_warns_of_nothing_new(saved: Saved) -> None:
    folder = saved("llama_tied")
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        models.generate(tf.AutoModelForCausalLM.from_pretrained(folder))
    limits = smallest(folder)
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        models.generate(tf.AutoModelForCausalLM.from_pretrained(folder, overflow=limits))
    assert {str(w.message) for w in ours} <= {str(w.message) for w in theirs}


def test_repository_in_the_hubs_cache(saved: Saved, tmp_path: Path) -> None:
    """As huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    repository = tmp_path / "models--owner--name"
    copy_folder(saved("llama"), repository / "blobs")
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    limits = smallest(saved("llama"))
    model = tf.AutoModelForCausalLM.from_pretrained("owner/name", overflow=limits, **options)
    attached = overflowml.attachment(model)
    assert attached is not None
    assert attached.plan.fingerprint == overflowml.plan(saved("llama"), overflow=limits).fingerprint
    assert_same(models.call("llama", model), models.call("llama", tf.AutoModelForCausalLM.from_pretrained("owner/name", **options)))
