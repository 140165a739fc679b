"""A folder, the load of it and the live model are the same facts; and facts cost no weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import safetensors.torch
import torch
import transformers as tf

import overflowml
from overflowml_core.inspect.safetensors import read_header
from overflowml_core.runtime.reader import FileReader
from tests.hosts import models, pipelines
from tests.hosts.check import smallest

Saved = Callable[..., Path]


def _profile_once(options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Trace a model in the dtype that it has alone: in another one it has other bytes, not other works."""
    if options:
        request.getfixturevalue("unprofiled")


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": "auto"}])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_transformers_fingerprint(name: str, options: dict[str, Any], saved: Saved, request: pytest.FixtureRequest) -> None:
    _profile_once(options, request)
    folder = saved(name)
    cls = getattr(tf, models.FAMILIES[name].model)
    limits = smallest(folder, **options)
    planned = overflowml.plan(folder, overflow=limits, **options)
    loaded = overflowml.attachment(cls.from_pretrained(folder, overflow=limits, **options))
    assert loaded is not None
    live = cls.from_pretrained(folder, **options)
    assert overflowml.describe(live).fingerprint == planned.network_fingerprint
    managed = overflowml.manage(live, limits)
    assert loaded.plan.fingerprint == managed.plan.fingerprint == planned.fingerprint
    assert loaded.plan.weight_bytes == planned.weight_bytes == sum(p.numel() * p.element_size() for p in live.parameters())


@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_diffusers_fingerprint(name: str, options: dict[str, Any], saved_pipeline: Saved, request: pytest.FixtureRequest) -> None:
    _profile_once(options, request)
    folder = saved_pipeline(name)
    options = {**options, **pipelines.without_tokenizers(name)}
    limits = smallest(folder, **options)
    planned = overflowml.plan(folder, overflow=limits, **options)
    loaded = overflowml.attachment(df.DiffusionPipeline.from_pretrained(folder, overflow=limits, **options))
    assert loaded is not None
    live = df.DiffusionPipeline.from_pretrained(folder, **options)
    assert overflowml.describe(live).fingerprint == planned.network_fingerprint
    managed = overflowml.manage(live, limits)
    assert loaded.plan.fingerprint == managed.plan.fingerprint == planned.fingerprint


def test_fingerprint_tells_models_apart(saved: Saved) -> None:
    prints = {overflowml.describe(saved(name)).fingerprint for name in models.FAMILIES}
    assert len(prints) == len(models.FAMILIES)
    assert overflowml.describe(saved("llama"), dtype=torch.bfloat16).fingerprint not in prints
    assert overflowml.describe(saved("llama", max_shard_size="40KB")).fingerprint in prints


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "t5", "clip"])
def test_describing_transformers_reads_no_weight(name: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(name)
    _forbid_reading(monkeypatch)
    assert overflowml.describe(folder).weight_bytes > 0


@pytest.mark.parametrize("name", ["flux", "controlnet", "wan"])
def test_describing_diffusers_reads_no_weight_beside_single_files_that_it_maps(
    name: str, saved_pipeline: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_pipeline(name)
    monkeypatch.setattr(FileReader, "read", _forbidden)
    assert overflowml.describe(folder, **pipelines.without_tokenizers(name)).weight_bytes > 0


def _forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("a weight was read")


def _forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from overflowml_transformers import defer

    monkeypatch.setattr(FileReader, "read", _forbidden)
    monkeypatch.setattr(defer, "safe_open", _forbidden)
    monkeypatch.setattr(safetensors.torch, "load_file", _forbidden)


def _hollow(source: Path, target: Path) -> Path:
    """The same folder, every data section a hole: its pages cost nothing until somebody touches them."""
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                data_offset = min(t.offset_bytes for t in read_header(path).tensors)
                with path.open("rb") as whole, place.open("wb") as hollow:
                    hollow.write(whole.read(data_offset))
                    hollow.truncate(path.stat().st_size)
            else:
                place.write_bytes(path.read_bytes())
    return target


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a gigabyte of a model and nothing on the disk: only its header is there."""
    folder = tmp_path_factory.mktemp("large")
    config = tf.LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=40, num_attention_heads=8, vocab_size=4000)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in model.state_dict().items():
        size = tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    import json
    import struct

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    assert end > 400 * 2**20
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_describing_a_large_model_takes_little_time_and_memory(large: Path) -> None:
    overflowml.describe(large)  # imports and caches
    before, start = _resident_bytes(), time.process_time()
    network = overflowml.describe(large)
    assert time.process_time() - start < 10
    assert _resident_bytes() - before < 60 * 2**20
    assert network.weight_bytes > 400 * 2**20
    assert len(network.components[0].blocks) == 40


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_loading_a_large_model_takes_its_budget_and_not_its_size(large: Path) -> None:
    before = _resident_bytes()
    model = tf.AutoModelForCausalLM.from_pretrained(large, overflow=overflowml.Limits("80MB", reserve="1MB"))
    attached = overflowml.attachment(model)
    assert attached is not None
    assert attached.plan.strategy == "stream"
    assert _resident_bytes() - before < 200 * 2**20
    overflowml.release(model)


def test_sparse_pipeline_is_described_without_touching_its_data(saved_pipeline: Saved, tmp_path: Path) -> None:
    source = saved_pipeline("flux")
    folder = _hollow(source, tmp_path)
    options = pipelines.without_tokenizers("flux")
    assert overflowml.describe(folder, **options).fingerprint == overflowml.describe(source, **options).fingerprint


def test_description_can_be_planned_for_any_workload(saved: Saved, saved_pipeline: Saved) -> None:
    few = overflowml.describe(saved("llama"), overflowml.Workload(prompt_tokens=16))
    many = overflowml.describe(saved("llama"), overflowml.Workload(prompt_tokens=4096, batch=4))
    assert few.components[0].activation_bytes < many.components[0].activation_bytes
    assert few.fingerprint == many.fingerprint
    options = pipelines.without_tokenizers("flux")
    small = overflowml.describe(saved_pipeline("flux"), overflowml.Workload(height=64, width=64), **options)
    big = overflowml.describe(saved_pipeline("flux"), overflowml.Workload(height=192, width=192), **options)
    assert sum(c.activation_bytes for c in small.components) < sum(c.activation_bytes for c in big.components)


def test_options_of_the_host_that_say_nothing_about_weights(saved: Saved, saved_pipeline: Saved) -> None:
    assert overflowml.describe(saved("llama"), output_loading_info=True).fingerprint == overflowml.describe(saved("llama")).fingerprint
    part = saved_pipeline("flux") / "transformer"
    assert overflowml.describe(part, output_loading_info=True).fingerprint == overflowml.describe(part).fingerprint
