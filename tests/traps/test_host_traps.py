"""Each trap of a host's call, on a tiny real model: the guard that the catalog names really holds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import accelerate
import diffusers as df
import torch
import transformers as tf

import overflowml
from overflowml_core import session
from overflowml_core.errors import BadLimits, DoesNotFit, Managed, OverflowmlError, UnsafeCheckpoint
from overflowml_core.traps import CATALOG
from tests.hosts import models, pipelines
from tests.hosts.check import assert_same, assert_same_weights, copy_folder, smallest, tensors_in, whole_blocks
from tests.hosts.conftest import (  # noqa: F401 -- fixtures, three of them for every test
    hosts,
    import_path,
    quiet,
    saved,
    saved_pipeline,
    shared,
    small_work,
)

Saved = Callable[..., Path]
HOST_TRAPS = [trap for trap in CATALOG if trap.kind == "host"]
_NO_TOKENS = pipelines.without_tokenizers("stable_diffusion")
_CPU = torch.device("cpu")


@pytest.fixture
def folder(saved_pipeline: Saved) -> Path:  # noqa: F811 -- the fixture imported above
    return saved_pipeline("stable_diffusion")


@pytest.fixture
def pipe(folder: Path):
    made = df.StableDiffusionPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    yield made
    session.release(made)


@pytest.fixture
def llama(saved: Saved):  # noqa: F811
    folder = saved("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, overflow=whole_blocks(folder))
    yield model
    session.release(model)


def test_every_host_trap_has_a_test():
    functions = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert [trap.name for trap in HOST_TRAPS if trap.name not in functions] == []


def _still_right(pipe: Any, folder: Path) -> None:
    """The pipeline is managed as before, and gives what the plain one gives."""
    attached = session.attachment(pipe)
    assert attached is not None
    assert attached.plan.strategy == "stream"
    plain = df.StableDiffusionPipeline.from_pretrained(folder, **_NO_TOKENS)
    assert_same(pipelines.run("stable_diffusion", pipe), pipelines.run("stable_diffusion", plain))


# ---- diffusers


def test_component_offload_grows(pipe, folder):
    with pytest.raises(Managed, match=r"enable_model_cpu_offload.*overflowml\.release"):
        pipe.enable_model_cpu_offload(device="cpu")
    _still_right(pipe, folder)


def test_sequential_offload(pipe, folder):
    with pytest.raises(Managed, match="enable_sequential_cpu_offload"):
        pipe.enable_sequential_cpu_offload(device="cpu")
    assert not any(p.is_meta for p in pipe.unet.state_dict().values())
    _still_right(pipe, folder)


def test_group_offload_of_a_vae(pipe, folder):
    by_blocks = {"onload_device": _CPU, "offload_type": "block_level", "num_blocks_per_group": 1}
    for target in (pipe, pipe.vae):
        with pytest.raises(Managed, match="enable_group_offload"):
            target.enable_group_offload(**by_blocks)
    # ``decode`` by itself, as pipelines call it, has all of its weights.
    latents = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = df.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        assert_same(pipe.vae.decode(latents).sample, plain.decode(latents).sample)


def test_group_offload_applied_past_the_pipeline(pipe, folder):
    from diffusers.hooks import apply_group_offloading

    for part in (pipe.vae, pipe.unet.mid_block):
        with pytest.raises(Managed, match=rf"apply_group_offloading\({type(part).__name__}"):
            apply_group_offloading(part, onload_device=_CPU, offload_type="leaf_level")
        assert not any(hasattr(inner, "_diffusers_hook") for inner in part.modules())
    _still_right(pipe, folder)
    plain = df.AutoencoderKL.from_pretrained(folder / "vae")
    apply_group_offloading(plain, onload_device=_CPU, offload_type="leaf_level")
    assert any(hasattr(inner, "_diffusers_hook") for inner in plain.modules())


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_moved_after_offload(pipe, where):
    with pytest.raises(Managed, match=rf"pipeline\.to\('{where}'\)"):
        pipe.to(where)


def test_layerwise_casting_stays(pipe, folder):
    with pytest.raises(Managed, match="enable_layerwise_casting"):
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    assert {p.dtype for p in pipe.unet.state_dict().values() if p.is_floating_point()} == {torch.float32}
    _still_right(pipe, folder)


def test_pipeline_device_map_drops_a_component(folder):
    from diffusers.pipelines.pipeline_loading_utils import _assign_components_to_devices

    if df.__version__ == "0.42.1":  # the trap is still open there
        mapped = _assign_components_to_devices({"transformer": 100, "text_encoder": 90, "vae": 1}, {0: 50})
        assert not any("transformer" in names for names in mapped.values())
    with pytest.raises(BadLimits, match=r"device_map='balanced'"):
        df.StableDiffusionPipeline.from_pretrained(folder, overflow="8GB", device_map="balanced", **_NO_TOKENS)
    plan = overflowml.plan(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    assert {name for phase in plan.phases for name in phase.components} == {"text_encoder", "unet", "vae"}


def test_from_pipe_upcasts(saved_pipeline):  # noqa: F811
    folder, dtype = saved_pipeline("stable_diffusion", torch.bfloat16), {"torch_dtype": torch.bfloat16}
    limits = smallest(folder, **dtype, **_NO_TOKENS)
    pipe = df.StableDiffusionPipeline.from_pretrained(folder, overflow=limits, **dtype, **_NO_TOKENS)
    try:
        with pytest.raises(DoesNotFit, match=r"float32.*bfloat16"):
            df.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
        shared = df.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
        assert shared.unet is pipe.unet
    finally:
        session.release(pipe)


def test_two_owners_of_a_component(pipe, folder):
    second = df.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(OverflowmlError, match="is managed by overflowml already"):
        overflowml.manage(second)
    with pytest.raises(Managed):
        second.enable_model_cpu_offload(device="cpu")
    _still_right(pipe, folder)


def test_sdxl_vae_overflows(saved_pipeline):  # noqa: F811
    folder, options = saved_pipeline("sdxl", torch.float16), {"torch_dtype": torch.float16, **pipelines.without_tokenizers("sdxl")}
    plain = df.StableDiffusionXLPipeline.from_pretrained(folder, **options)
    managed = df.StableDiffusionXLPipeline.from_pretrained(folder, overflow=overflowml.Limits(device_memory="4MB", reserve=0), **options)
    try:
        for pipe in (plain, managed):
            pipe.vae.register_to_config(force_upcast=True)
        assert_same(pipelines.run("sdxl", managed), pipelines.run("sdxl", plain))
        assert {p.dtype for p in managed.vae.parameters()} == {torch.float16}
    finally:
        session.release(managed)


def test_slices_of_a_managed_unet(pipe, folder):
    plain = df.StableDiffusionPipeline.from_pretrained(folder, **_NO_TOKENS)
    for each in (pipe, plain):
        each.enable_attention_slicing()
    assert_same(pipelines.run("stable_diffusion", pipe), pipelines.run("stable_diffusion", plain))


# ---- transformers


def test_device_map_matches_prefixes(llama, saved):  # noqa: F811
    from transformers.integrations.accelerate import expand_device_map

    if tf.__version__ == "5.23.0":  # the trap is still open there
        mapped = expand_device_map({"model.layers.1": "cpu", "": "disk"}, ["model.layers.1.w", "model.layers.10.w"])
        assert mapped["model.layers.10.w"] == "cpu"
    with pytest.raises(BadLimits, match="device_map"):
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow="8GB", device_map={"model.layers.1": "cpu", "": "cpu"})
    attached = session.attachment(llama)
    assert attached is not None
    assert [p.block for p in attached.plan.placements()] == [f"model.layers.{i}" for i in range(4)]


def test_pipeline_takes_the_first_device(llama):
    assert next(iter(llama.hf_device_map.items())) == ("", "cpu")
    assert "disk" in llama.hf_device_map.values()
    made = tf.pipeline("feature-extraction", model=llama, tokenizer=_Tokens(), framework="pt")
    assert made.device == _CPU


class _Tokens:
    """Enough of a tokenizer for a pipeline to be made."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": models.TOKENS}


def test_generate_compiles_offloaded_layers(llama, saved, monkeypatch):  # noqa: F811
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("generate compiles a managed model")

    monkeypatch.setattr(torch, "compile", refuse)
    assert {"cpu", "disk"} & set(llama.hf_device_map.values())
    plain = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
    ours = models.generate(llama, cache_implementation="static")
    assert torch.equal(ours, models.generate(plain, cache_implementation="static"))


def test_pipeline_retries_in_float32(saved, monkeypatch):  # noqa: F811
    calls = []
    real = session.make_plan
    monkeypatch.setattr(session, "make_plan", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    with pytest.raises(DoesNotFit, match="overflow="):
        tf.pipeline("text-generation", model=str(saved("llama")), model_kwargs={"overflow": overflowml.Limits.exactly(1, reserve=0)})
    assert calls == [1]


def test_weights_loaded_into_a_managed_model(llama, saved):  # noqa: F811
    zeros = {name: torch.zeros_like(value) for name, value in llama.state_dict().items()}
    with pytest.raises(Managed, match="load_state_dict"):
        llama.load_state_dict(zeros)
    assert_same_weights(llama, tf.AutoModelForCausalLM.from_pretrained(saved("llama")), managed=True)


def test_save_of_an_offloaded_model(llama, saved, tmp_path):  # noqa: F811
    llama.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, tf.AutoModelForCausalLM.from_pretrained(saved("llama")))


def _right_in_the_smallest_budget(name: str, folder: Path) -> Any:
    family = getattr(tf, models.FAMILIES[name].model)
    model = family.from_pretrained(folder, overflow=smallest(folder))
    attached = session.attachment(model)
    assert attached is not None
    assert any(p.tier.value == "disk" for p in attached.plan.placements())
    # Not bit for bit: where a plain weight lies in its mapped file decides which kernel reads it.
    ours, theirs = (list(tensors_in(models.call(name, each))) for each in (model, family.from_pretrained(folder)))
    assert ours
    torch.testing.assert_close(ours, theirs)
    return model


def test_parts_that_are_never_called(saved):  # noqa: F811
    # The head of SigLIP reads the projection of nn.MultiheadAttention without calling it.
    model = _right_in_the_smallest_budget("siglip", saved("siglip"))
    assert any(isinstance(part, torch.nn.MultiheadAttention) for part in model.modules())
    session.release(model)


def test_fused_kernels_read_children(saved):  # noqa: F811
    session.release(_right_in_the_smallest_budget("mamba", saved("mamba")))


def test_buffers_stay_behind(saved):  # noqa: F811
    model = _right_in_the_smallest_budget("deepseek_v3", saved("deepseek_v3"))
    biases = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert biases
    assert all(not value.is_meta and value.abs().sum() > 0 for value in biases.values())
    session.release(model)


def test_tied_head_is_split(saved):  # noqa: F811
    folder = saved("llama_tied")
    model = _right_in_the_smallest_budget("llama_tied", folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    session.release(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_in_pickle(saved, tmp_path):  # noqa: F811
    folder = copy_folder(saved("llama"), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="save_pretrained"):
        tf.AutoModelForCausalLM.from_pretrained(folder, overflow="8GB")


# ---- accelerate


def test_hooks_removed_by_others(pipe, folder):
    from accelerate.hooks import remove_hook_from_module

    with pytest.raises(Managed):
        remove_hook_from_module(pipe.unet, recurse=True)
    with pytest.raises(Managed):
        accelerate.cpu_offload(pipe.unet, execution_device=_CPU)
    _still_right(pipe, folder)


@pytest.mark.parametrize("move", [lambda m: m.model.layers[0].to(torch.float64), lambda m: m.lm_head.half(), lambda m: m.model.to("meta")])
def test_parts_moved_by_hand(llama, move):
    with pytest.raises(Managed, match="a move or cast"):
        move(llama)
    assert {p.dtype for p in llama.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_copies_of_an_offloaded_model(llama, make):
    with pytest.raises(Managed, match="a copy or pickle"):
        make(llama)


def test_offload_folder_of_another_model(saved):  # noqa: F811
    # Two live models of one shape and other weights, packed into one folder one after the other.
    for scale in (1.0, -2.0):
        model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        expected = models.call("llama", model)
        overflowml.manage(model, smallest(model))
        assert_same(models.call("llama", model), expected)
        session.release(model)
