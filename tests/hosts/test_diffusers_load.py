"""How a diffusers pipeline or model may be saved and asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
from safetensors.torch import load_file

import overflowml
from overflowml_core.errors import BadLimits, Managed, OverflowmlError
from tests.hosts import pipelines
from tests.hosts.check import assert_same, assert_same_weights, smallest

pytestmark = pytest.mark.usefixtures("unprofiled")
Saved = Callable[..., Path]
_NO_TOKENS = pipelines.without_tokenizers("flux")
_SD = pipelines.without_tokenizers("stable_diffusion")


def _check(folder: Path, name: str = "flux", cls: Any = df.DiffusionPipeline, **options: Any) -> Any:
    """Load with and without us, compare weights and images; returns our pipeline, still managed."""
    options = {**pipelines.without_tokenizers(name), **options}
    theirs = cls.from_pretrained(folder, **options)
    pipe = cls.from_pretrained(folder, overflow=smallest(folder, **options), **options)
    assert type(pipe) is type(theirs)
    assert overflowml.attachment(pipe) is not None
    for part, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            assert_same_weights(pipe.components[part], module, managed=True)
    return pipe


@pytest.mark.parametrize("shard", ["20KB", "50KB"])
def test_sharded(shard: str, saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux", max_shard_size=shard)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    pipe = _check(folder)
    assert_same(pipelines.run("flux", pipe), pipelines.run("flux", df.FluxPipeline.from_pretrained(folder, **_NO_TOKENS)))


def test_variant(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("stable_diffusion", torch.float16, variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    _check(folder, "stable_diffusion", variant="fp16", torch_dtype=torch.float16)
    _check(folder, "stable_diffusion", variant="fp16")


def test_variant_that_only_some_components_have(saved_pipeline: Saved, tmp_path: Path) -> None:
    pipelines.build("stable_diffusion").save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    _check(tmp_path, "stable_diffusion", variant="fp16")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(stored: torch.dtype, asked: torch.dtype, saved_pipeline: Saved) -> None:
    _check(saved_pipeline("flux", stored), torch_dtype=asked)


def test_dtype_without_a_word(saved_pipeline: Saved) -> None:
    """diffusers casts its own models to float32, transformers leaves the encoders in bfloat16."""
    pipe = _check(saved_pipeline("flux", torch.bfloat16))
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_of_each_component(key: str, saved_pipeline: Saved) -> None:
    chosen = {"transformer": torch.bfloat16, "vae": torch.float16, "default": torch.float32}
    try:
        df.FluxPipeline.from_pretrained(saved_pipeline("flux"), **{key: chosen}, **_NO_TOKENS)
    except TypeError:
        pytest.skip(f"this diffusers has no {key}")
    pipe = _check(saved_pipeline("flux"), **{key: chosen})
    if key == "torch_dtype":
        assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float16, torch.float32)


def test_weights_that_the_model_keeps_in_float32(saved_pipeline: Saved) -> None:
    """Wan keeps its norms and time embeddings (``_keep_in_fp32_modules``)."""
    pipe = _check(saved_pipeline("wan"), "wan", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("loader", ["DiffusionPipeline", "FluxPipeline", "AutoPipelineForText2Image"])
def test_loader(loader: str, saved_pipeline: Saved) -> None:
    pipe = _check(saved_pipeline("flux"), cls=getattr(df, loader))
    assert type(pipe) is df.FluxPipeline


def test_other_pipeline_class_over_the_same_folder(saved_pipeline: Saved) -> None:
    pipe = df.StableDiffusionImg2ImgPipeline.from_pretrained(
        saved_pipeline("stable_diffusion"), overflow=smallest(saved_pipeline("stable_diffusion"), **_SD), **_SD
    )
    assert type(pipe) is df.StableDiffusionImg2ImgPipeline
    assert overflowml.attachment(pipe) is not None


def test_subclass_of_the_users(saved_pipeline: Saved) -> None:
    class Mine(df.FluxPipeline):
        pass

    pipe = Mine.from_pretrained(saved_pipeline("flux"), overflow=smallest(saved_pipeline("flux"), **_NO_TOKENS), **_NO_TOKENS)
    assert type(pipe) is Mine
    assert overflowml.attachment(pipe) is not None


def test_from_pipe_shares_the_managed_components(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("stable_diffusion")
    expected_first = pipelines.run("stable_diffusion", df.StableDiffusionPipeline.from_pretrained(folder, **_SD))
    first = df.StableDiffusionPipeline.from_pretrained(folder, overflow=smallest(folder, **_SD), **_SD)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def redraw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            embeds = pipe.text_encoder(pipelines.TOKENS)[0]
            return pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=-embeds,
                image=image,
                strength=0.8,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
            ).images

    theirs = df.StableDiffusionImg2ImgPipeline.from_pretrained(folder, **_SD)
    for second in (df.StableDiffusionImg2ImgPipeline.from_pipe(first), df.AutoPipelineForImage2Image.from_pipe(first)):
        assert second.unet is first.unet
        assert_same(redraw(second), redraw(theirs))
        assert_same(pipelines.run("stable_diffusion", first), expected_first)
        with pytest.raises(OverflowmlError, match="managed by overflowml already"):
            overflowml.manage(second, True)
    overflowml.release(first)
    assert_same(redraw(second), redraw(theirs))


def test_component_that_the_user_passes_in(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    transformer = df.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    pipe = df.FluxPipeline.from_pretrained(folder, transformer=transformer, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    assert pipe.transformer is transformer
    assert_same(pipelines.run("flux", pipe), pipelines.run("flux", df.FluxPipeline.from_pretrained(folder, **_NO_TOKENS)))


def test_component_that_is_left_out(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    pipe = df.FluxPipeline.from_pretrained(
        folder, text_encoder=None, text_encoder_2=None, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS
    )
    attached = overflowml.attachment(pipe)
    assert attached is not None
    assert [phase.name for phase in attached.plan.phases] == ["transformer", "vae"]


def test_module_of_a_managed_pipeline_cannot_be_managed_in_another(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    first = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    with pytest.raises(OverflowmlError, match=r"vae.* is managed by overflowml already") as caught:
        df.FluxPipeline.from_pretrained(folder, vae=first.vae, overflow=True, **_NO_TOKENS)
    assert "\n" not in str(caught.value)
    assert_same(pipelines.run("flux", first), pipelines.run("flux", df.FluxPipeline.from_pretrained(folder, **_NO_TOKENS)))


def test_one_module_under_two_names(saved_pipeline: Saved) -> None:
    pipe = pipelines.build("sdxl")
    shared = df.FluxPipeline.from_pretrained(saved_pipeline("flux"), **_NO_TOKENS)
    pipe.register_modules(image_encoder=shared.vae, feature_extractor=None)
    pipe.vae = shared.vae
    overflowml.manage(pipe, smallest(pipe))
    assert overflowml.release(pipe)


def test_list_of_controlnets(saved_pipeline: Saved) -> None:
    pipe = pipelines.build("controlnet")
    other = pipelines.build("controlnet").controlnet
    pipe.controlnet = df.MultiControlNetModel([pipe.controlnet, other])

    def run() -> torch.Tensor:
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            embeds = pipe.text_encoder(pipelines.TOKENS)[0]
            return pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=-embeds,
                image=[image, 1 - image],
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
            ).images

    expected = run()
    overflowml.manage(pipe, smallest(pipe))
    assert_same(run(), expected)


# ---- single models


@pytest.mark.parametrize("loader", ["FluxTransformer2DModel", "AutoModel"])
@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": torch.float16}])
def test_single_model(loader: str, options: dict[str, Any], saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux") / "transformer"
    cls = getattr(df, loader)
    # AutoModel of diffusers takes no path object
    theirs = cls.from_pretrained(str(folder), **options)
    model = cls.from_pretrained(str(folder), overflow=smallest(folder, **options), **options)
    assert_same_weights(model, theirs, managed=True)
    assert type(model) is df.FluxTransformer2DModel
    with pytest.raises(Managed, match="release"):
        model.to("cpu")
    overflowml.release(model)
    model.to("cpu")


def test_single_unet(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("stable_diffusion") / "unet"
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 6, 32)
    theirs = df.UNet2DConditionModel.from_pretrained(folder)
    model = df.UNet2DConditionModel.from_pretrained(folder, overflow=smallest(folder))
    with torch.no_grad():
        assert_same(model(*inputs).sample, theirs(*inputs).sample)


def test_single_model_in_a_subfolder(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    options = {"subfolder": "transformer"}
    limits = smallest(folder, **options)
    model = df.FluxTransformer2DModel.from_pretrained(folder, overflow=limits, **options)
    attached = overflowml.attachment(model)
    assert attached is not None
    assert attached.plan.fingerprint == overflowml.plan(folder / "transformer", overflow=limits).fingerprint
    assert_same_weights(model, df.FluxTransformer2DModel.from_pretrained(folder, **options), managed=True)


def test_single_vae_encodes_and_decodes(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("sdxl") / "vae"
    image = torch.rand(1, 3, 32, 32)
    theirs = df.AutoencoderKL.from_pretrained(folder)
    model = df.AutoencoderKL.from_pretrained(folder, overflow=smallest(folder))
    with torch.no_grad():
        code = theirs.encode(image).latent_dist.mean
        assert_same(model.encode(image).latent_dist.mean, code)
        assert_same(model.decode(code).sample, theirs.decode(code).sample)


@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "sana", "stable_diffusion"])
def test_vae_of_a_managed_pipeline_called_by_the_user(name: str, saved_pipeline: Saved) -> None:
    """Before the pipeline's own first run, and while another phase is on the device."""
    folder, options = saved_pipeline(name), pipelines.without_tokenizers(name)
    theirs = df.DiffusionPipeline.from_pretrained(folder, **options)
    pipe = df.DiffusionPipeline.from_pretrained(folder, overflow=smallest(folder, **options), **options)
    torch.manual_seed(2)
    image = torch.rand(1, 3, 32, 32) if name in ("flux", "stable_diffusion", "sana") else torch.rand(1, 3, 9, 32, 32)
    for _ in range(2):
        with torch.no_grad():
            first, second = theirs.vae.encode(image), pipe.vae.encode(image)
            code = first.latent if hasattr(first, "latent") else first.latent_dist.mean
            assert_same(second.latent if hasattr(second, "latent") else second.latent_dist.mean, code)
            assert_same(pipe.text_encoder(pipelines.TOKENS)[0], theirs.text_encoder(pipelines.TOKENS)[0])
            assert_same(pipe.vae.decode(code).sample, theirs.vae.decode(code).sample)


def test_vae_with_tiling_and_slicing(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    theirs = df.FluxPipeline.from_pretrained(folder, **_NO_TOKENS)
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    for each in (theirs, pipe):
        each.vae.enable_tiling()
        each.vae.enable_slicing()
        each.vae.tile_sample_min_size, each.vae.tile_latent_min_size = 16, 8
    code = torch.randn(2, 1, 24, 24)
    with torch.no_grad():
        assert_same(pipe.vae.decode(code).sample, theirs.vae.decode(code).sample)


# ---- guards


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.to(torch.float16),
        lambda p: p.enable_model_cpu_offload(),
        lambda p: p.enable_sequential_cpu_offload(),
        lambda p: p.enable_group_offload(onload_device=torch.device("cpu")),
        lambda p: p.remove_all_hooks(),
        lambda p: p.reset_device_map(),
        lambda p: p.transformer.half(),
        lambda p: p.transformer.enable_group_offload(onload_device=torch.device("cpu")),
        lambda p: p.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn),
        lambda p: p.text_encoder.to("meta"),
        lambda p: p.vae.to("meta", torch.float64),
        lambda p: p.vae.load_state_dict(p.vae.state_dict()),
    ],
)
def test_moving_a_managed_pipeline_is_refused(move: Callable[[Any], Any], saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    with pytest.raises(Managed, match=r"overflowml\.release\(pipeline\)") as caught:
        move(pipe)
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        pipe.text_encoder(pipelines.TOKENS)
    overflowml.release(pipe)
    pipe.to("cpu")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize(
    "ask",
    [
        lambda v: v.to("cpu"),
        lambda v: v.to(torch.device("cpu")),
        lambda v: v.to(torch.float32),
        lambda v: v.to("cpu", torch.float32),
        lambda v: v.to(device="cpu", dtype=torch.float32),
        lambda v: v.to(dtype=v.dtype),
        lambda v: v.to(torch.zeros(1)),
    ],
)
def test_component_may_be_asked_to_be_what_it_is(ask: Callable[[Any], Any], saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    assert ask(pipe.vae) is pipe.vae


def test_execution_device(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("flux")
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    assert pipe._execution_device == torch.device("cpu")
    assert pipe.device == torch.device("cpu")
    assert pipe.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["balanced", "cpu", {"transformer": "cpu"}])
@pytest.mark.parametrize("part", ["", "transformer"])
def test_device_map_contradicts_overflow(device_map: object, part: str, saved_pipeline: Saved) -> None:
    cls = df.FluxTransformer2DModel if part else df.FluxPipeline
    with pytest.raises(BadLimits, match="give one of them"):
        cls.from_pretrained(saved_pipeline("flux") / part, overflow=True, device_map=device_map)


@pytest.mark.parametrize("request_", [True, "8GB", "512MiB", 2**30, {"device_memory": "1GB"}, overflowml.Limits("1GB")])
def test_overflow(request_: object, saved_pipeline: Saved) -> None:
    pipe = df.FluxPipeline.from_pretrained(saved_pipeline("flux"), overflow=request_, **_NO_TOKENS)
    attached = overflowml.attachment(pipe)
    assert attached is not None
    assert attached.plan.strategy == "direct"


@pytest.mark.parametrize("options", [{}, {"overflow": False}, {"overflow": None}])
def test_pipeline_that_is_not_ours_has_no_trace_of_us(options: dict[str, Any], saved_pipeline: Saved) -> None:
    overflowml.uninstall()
    theirs = df.FluxPipeline.from_pretrained(saved_pipeline("flux"), **_NO_TOKENS)
    overflowml.install()
    pipe = df.FluxPipeline.from_pretrained(saved_pipeline("flux"), **options, **_NO_TOKENS)
    assert overflowml.attachment(pipe) is None
    assert set(vars(pipe)) == set(vars(theirs))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for (name, mine), (_, other) in zip(getattr(pipe, part).named_modules(), getattr(theirs, part).named_modules(), strict=True):
            assert set(vars(mine)) == set(vars(other)), name
            assert not mine._forward_pre_hooks, name


# ---- what comes back to disk


def test_save_pretrained_of_a_managed_pipeline_writes_the_true_weights(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("flux")
    pipe = df.FluxPipeline.from_pretrained(folder, overflow=smallest(folder, **_NO_TOKENS), **_NO_TOKENS)
    pipelines.run("flux", pipe)
    pipe.save_pretrained(tmp_path)
    for path in folder.rglob("*.safetensors"):
        theirs, ours = load_file(path), load_file(tmp_path / path.relative_to(folder))
        assert set(theirs) == set(ours)
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_scheduler_can_be_exchanged(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("stable_diffusion")
    pipe = df.StableDiffusionPipeline.from_pretrained(folder, overflow=smallest(folder, **_SD), **_SD)
    theirs = df.StableDiffusionPipeline.from_pretrained(folder, **_SD)
    for each in (pipe, theirs):
        each.scheduler = df.EulerDiscreteScheduler.from_config(each.scheduler.config)
    assert_same(pipelines.run("stable_diffusion", pipe), pipelines.run("stable_diffusion", theirs))
