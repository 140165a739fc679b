"""Pipelines are profiled by their own code on tensors without data: every component, in the order and as often as it really runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.utils.flop_counter import FlopCounterMode

import overflowml
import overflowml_diffusers
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Component, Network, Workload
from overflowml_core.inspect.profile_cache import ProfileCache
from overflowml_core.runtime.fake import tracing
from overflowml_diffusers.replay import fake_of
from overflowml_diffusers.tokenizers import StubTokenizer
from overflowml_diffusers.twin import twin_module
from overflowml_diffusers.vae import TracedVae
from tests.hosts import pipelines
from tests.hosts.check import assert_one_line, copy_folder, smallest

Saved = Callable[..., Path]
STEPS = 3
SMALL = Workload(height=64, width=64, steps=STEPS)
CLIP = Workload(height=32, width=32, frames=9, steps=STEPS)
CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def workload_of(name: str) -> Workload:
    return CLIP if name in ("wan", "ltx") else SMALL


def measure(source: Any, workload: Workload, **options: Any) -> Network:
    """As the session does it, without a cache."""
    network = overflowml_diffusers.overflowml_describe(source=source, workload=workload, options=dict(options))
    assert network is not None
    measured = overflowml_diffusers.overflowml_measure(source=source, network=network, workload=workload, options=dict(options))
    assert measured is not None
    assert measured.fingerprint == network.fingerprint
    assert [(c.name, c.blocks, c.fingerprint) for c in measured.components] == [
        (c.name, c.blocks, c.fingerprint) for c in network.components
    ]
    return measured


def part(network: Network, name: str) -> Component:
    return next(c for c in network.components if c.name == name)


def passes(network: Network) -> dict[str, list[tuple[str, int]]]:
    return {c.name: [(p.name, p.count) for p in c.profiles] for c in network.components}


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_every_component_is_traced(name: str) -> None:
    network = measure(pipelines.build(name), workload_of(name))
    for component in network.components:
        assert component.activation_source == "traced"
        assert component.activation_bytes == max(p.activation_bytes for p in component.profiles) > 0
        for profile in component.profiles:
            assert profile.source == "traced"
            assert profile.flop > 0
            assert len(profile.blocks) == len(component.blocks)
            assert any(block.calls for block in profile.blocks) or not component.blocks


# Guidance doubles the batch in all of these but Wan, which calls its transformer twice, and FLUX, which was distilled.
_PASSES = {
    "flux": {
        "text_encoder": [("encode", 1)],
        "text_encoder_2": [("encode", 1)],
        "transformer": [("denoise", STEPS)],
        "vae": [("decode", 1)],
    },
    "stable_diffusion": {"text_encoder": [("encode", 2)], "unet": [("denoise", STEPS)], "vae": [("decode", 1)]},
    "controlnet": {
        "text_encoder": [("encode", 2)],
        "controlnet": [("denoise", STEPS)],
        "unet": [("denoise", STEPS)],
        "vae": [("decode", 1)],
    },
    "wan": {"text_encoder": [("encode", 2)], "transformer": [("denoise", 2 * STEPS)], "vae": [("decode", 1)]},
}


@pytest.mark.parametrize("name", _PASSES)
def test_passes_are_counted_as_they_run(name: str) -> None:
    assert passes(measure(pipelines.build(name), workload_of(name))) == _PASSES[name]


def test_work_of_a_guided_step_is_that_of_the_real_one() -> None:
    """Counted by torch's own counter in a real run with guidance, which doubles the batch."""
    pipe = pipelines.build("stable_diffusion")
    counter = FlopCounterMode(display=False)
    handles = [
        pipe.unet.register_forward_pre_hook(lambda *_: counter.__enter__() and None),
        pipe.unet.register_forward_hook(lambda *_: counter.__exit__(None, None, None)),
    ]
    embeds = torch.zeros(1, 77, 32)
    with torch.no_grad():
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, height=64, width=64, num_inference_steps=1, output_type="pt")
    for handle in handles:
        handle.remove()
    profile = part(measure(pipe, SMALL), "unet").profiles[0]
    works = [*profile.outside, *(work for block in profile.blocks for work in block.works)]
    real = counter.get_flop_counts()["Global"]
    assert sum(w.flop for w in works if w.kind == "conv") == real[torch.ops.aten.convolution] > 0
    products = sum(flop for operation, flop in real.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert sum(w.flop for w in works if w.kind == "matmul") == products > 0


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_larger_work_takes_more(name: str) -> None:
    pipe = pipelines.build(name)
    small = measure(pipe, SMALL)
    for larger in (Workload(height=128, width=64, steps=STEPS), Workload(height=64, width=64, batch=2, steps=STEPS)):
        big = measure(pipe, larger)
        for component in ("transformer", "vae"):
            assert part(big, component).activation_bytes > part(small, component).activation_bytes
            assert part(big, component).profiles[0].flop > part(small, component).profiles[0].flop


def test_many_steps_are_counted_and_not_run() -> None:
    pipe = pipelines.build("flux")
    few, many = (part(measure(pipe, Workload(height=64, width=64, steps=steps)), "transformer").profiles[0] for steps in (20, 5000))
    assert (few.count, many.count) == (20, 5000)
    assert few.blocks == many.blocks
    assert few.activation_bytes == many.activation_bytes


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan", "sana"])
def test_folder_and_live_pipeline_have_the_same_profiles(name: str, saved_pipeline: Saved) -> None:
    folder, options = saved_pipeline(name), pipelines.without_tokenizers(name)
    live = df.DiffusionPipeline.from_pretrained(folder, **options)
    assert measure(folder, workload_of(name), **options).components == measure(live, workload_of(name)).components


def test_nothing_of_the_users_pipeline_changes() -> None:
    pipe = pipelines.build("sd3")
    expected = pipelines.run("sd3", pipe)
    before = dict(vars(pipe))
    schedule = dict(vars(pipe.scheduler))
    parts = {name: list(vars(module)) for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    weights = {name: list(module.parameters()) for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    hooks = [len(inner._forward_hooks) for inner in pipe.transformer.modules()]
    state = torch.get_rng_state()
    measure(pipe, SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(vars(pipe)) == list(before)
    assert all(vars(pipe)[name] is value for name, value in before.items())
    assert all(vars(pipe.scheduler)[name] is value for name, value in schedule.items())
    for name, attributes in parts.items():
        assert list(vars(pipe.components[name])) == attributes
        assert all(now is then for now, then in zip(pipe.components[name].parameters(), weights[name], strict=True))
    assert [len(inner._forward_hooks) for inner in pipe.transformer.modules()] == hooks
    assert torch.equal(pipelines.run("sd3", pipe), expected)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipeline_that_works_on_an_image_gets_one(name: str) -> None:
    parts = pipelines.build("stable_diffusion").components
    pipe = getattr(df, name)(**{**parts, "safety_checker": None}, requires_safety_checker=False)
    network = measure(pipe, Workload(height=64, width=64, steps=10))
    assert [profile.name for profile in part(network, "vae").profiles] == ["encode", "decode"]
    assert all(profile.source == "traced" for component in network.components for profile in component.profiles)
    denoised = part(network, "unet").profiles[0].count
    assert denoised == (8 if "Img2Img" in name else 10)


def test_vae_in_half_precision_is_traced_in_the_float32_that_it_is_cast_to() -> None:
    half = part(measure(pipelines.build("sdxl", torch.float16), SMALL), "vae")
    full = part(measure(pipelines.build("sdxl"), SMALL), "vae")
    profile = half.profiles[0]
    assert {work.dtype for block in profile.blocks for work in block.works} == {"F32"}
    assert profile.flop == full.profiles[0].flop
    # Embeddings and latents beside it are half as large; the weights grow by what float32 takes beyond float16.
    assert half.activation_bytes + half.weight_bytes < full.activation_bytes + full.weight_bytes
    assert half.activation_bytes > full.activation_bytes - half.weight_bytes


def test_component_that_never_runs_is_said_to() -> None:
    pipe = pipelines.build("flux")
    pipe.register_modules(image_encoder=pipelines.build("sdxl").text_encoder)
    unused = part(measure(pipe, SMALL), "image_encoder")
    assert [(p.count, p.activation_bytes) for p in unused.profiles] == [(0, 0)]
    assert "does not call it" in unused.profiles[0].note


def test_pipeline_that_cannot_run_falls_back_to_its_components(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no way")

    pipe = pipelines.build("flux")
    monkeypatch.setattr(df.FluxPipeline, "prepare_latents", fail)
    network = measure(pipe, SMALL)
    assert all(p.source == "traced" and p.flop > 0 for c in network.components for p in c.profiles)
    assert all("no way" in p.note for c in network.components for p in c.profiles)
    assert part(network, "transformer").profiles[0].count == STEPS


def test_component_that_cannot_run_keeps_its_estimate_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no way")

    pipe = pipelines.build("flux")
    described = overflowml_diffusers.overflowml_describe(source=pipe, workload=SMALL, options={})
    assert described is not None
    monkeypatch.setattr(df.FluxTransformer2DModel, "forward", fail)
    transformer = part(measure(pipe, SMALL), "transformer")
    assert transformer.activation_source == "analytic"
    assert transformer.activation_bytes == part(described, "transformer").activation_bytes
    assert "no way" in transformer.profiles[0].note


@pytest.mark.parametrize("name", ["flux", "stable_diffusion", "controlnet", "sd3", "pixart", "wan", "ltx"])
def test_single_models_are_traced(name: str) -> None:
    for module in pipelines.build(name).components.values():
        if isinstance(module, df.ModelMixin):
            profiles = measure(module, workload_of(name)).components[0].profiles
            assert [p.source for p in profiles] == ["traced"], profiles


@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (5, 1), (17, 2)])
def test_frames_of_a_clip_are_traced_once_and_counted_exactly(frames: int, batch: int) -> None:
    """Against the trace of the whole decode, frame by frame."""
    vae = pipelines.build("wan").vae
    shape = (batch, 16, (frames - 1) // 4 + 1, 8, 12)
    with tracing() as tracer:
        twin = twin_module(vae)
        tracer.watch("vae", twin, ("decode",))
        twin.decode(fake_of(twin).new_empty(shape))
        whole = tracer.calls[-1]
    with tracing() as tracer:
        traced = TracedVae("vae", twin_module(vae), tracer)
        traced.module.decode(fake_of(traced.module).new_empty(shape))
        (known,) = traced.replays["decode"].known.values()
    counted = known.traced
    assert (counted.activation_bytes, counted.entry_bytes, counted.exit_bytes) == (
        whole.activation_bytes,
        whole.entry_bytes,
        whole.exit_bytes,
    )
    for mine, theirs in zip(counted.blocks, whole.blocks, strict=True):
        assert (mine.flop, mine.calls, mine.activation_bytes) == (theirs.flop, theirs.calls, theirs.activation_bytes)
        assert sum(w.calls for w in mine.works) == sum(w.calls for w in theirs.works)
        assert sum(w.traffic_bytes for w in mine.works) == sum(w.traffic_bytes for w in theirs.works)
    assert sum(w.traffic_bytes for w in counted.outside) == sum(w.traffic_bytes for w in whole.outside)


# ---- configurations without weights


def _without_weights(source: Path, target: Path) -> Path:
    folder = copy_folder(source, target)
    for path in folder.rglob("*.safetensors*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("name", ["flux", "wan", "stable_diffusion"])
def test_folder_without_weights_is_described_as_the_one_with_them(name: str, saved_pipeline: Saved, tmp_path: Path) -> None:
    folder, options = saved_pipeline(name), {**pipelines.without_tokenizers(name), "torch_dtype": torch.bfloat16}
    bare = _without_weights(folder, tmp_path)
    with_weights, without = measure(folder, workload_of(name), **options), measure(bare, workload_of(name))
    assert without.fingerprint == with_weights.fingerprint
    assert without.source == f"{bare} (config only)"
    assert without.components == with_weights.components


def test_model_without_weights_is_described(saved_pipeline: Saved, tmp_path: Path) -> None:
    bare = _without_weights(saved_pipeline("sd3") / "transformer", tmp_path)
    network = overflowml.describe(bare, dtype=torch.float32)
    assert network.source.endswith(" (config only)")
    assert network.fingerprint == overflowml.describe(saved_pipeline("sd3") / "transformer").fingerprint


def test_model_that_lost_its_weights_is_no_description(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = copy_folder(saved_pipeline("flux"), tmp_path)
    for path in (folder / "transformer").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(OverflowmlError):
        overflowml.describe(folder / "transformer")


@pytest.mark.parametrize(
    ("file", "change", "needle"),
    [
        ("model_index.json", {"_class_name": "NoSuchPipeline"}, "NoSuchPipeline"),
        ("model_index.json", {"transformer": ["diffusers", "NoSuchModel"]}, "NoSuchModel"),
        ("model_index.json", {"transformer": ["os", "system"]}, "os.system"),
        ("transformer/config.json", {"num_attention_heads": "many"}, "transformer"),
        ("text_encoder/config.json", {"hidden_size": -1}, "text_encoder"),
        ("text_encoder_2/config.json", {"num_layers": 10**9}, "1000000000"),
        ("transformer/config.json", {"num_layers": 10**9}, "1000000000"),
        ("transformer/config.json", {"joint_attention_dim": 10**18}, "transformer"),
    ],
)
def test_broken_configuration_is_one_clear_line(
    file: str, change: dict[str, Any], needle: str, saved_pipeline: Saved, tmp_path: Path
) -> None:
    folder = _without_weights(saved_pipeline("flux"), tmp_path)
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **change}))
    with pytest.raises(NotAModel) as caught:
        overflowml.describe(folder)
    assert_one_line(caught.value, needle)


_PARAMETERS = {
    "flux.1-dev": {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "transformer": 11_901_408_320, "vae": 83_819_683},
    "wan2.2-t2v-14b": {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584, "text_encoder": 5_680_910_336},
    "qwen-image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656},
    "hunyuanvideo": {"transformer": 12_821_012_544, "text_encoder": 7_505_186_816},
}


@pytest.mark.parametrize("name", _PARAMETERS)
def test_large_configurations_have_the_published_sizes(name: str) -> None:
    network = overflowml_diffusers.overflowml_describe(source=CONFIGS / name, workload=Workload(), options={})
    assert network is not None
    counts = {c.name: c.weight_count for c in network.components}
    assert {component: counts[component] for component in _PARAMETERS[name]} == _PARAMETERS[name]


@pytest.mark.slow
def test_flux_at_full_size_takes_what_is_known_of_it() -> None:
    network = measure(CONFIGS / "flux.1-dev", Workload(height=1024, width=1024))
    transformer = part(network, "transformer").profiles[0]
    assert transformer.count == 28
    products = sum(w.flop for b in transformer.blocks for w in b.works if w.kind == "matmul")
    assert products == pytest.approx(59.5e12, rel=0.01)
    assert transformer.activation_bytes == pytest.approx(468 * 2**20, rel=0.01)
    assert part(network, "vae").activation_bytes == pytest.approx(1537 * 2**20, rel=0.01)
    assert part(network, "text_encoder_2").activation_bytes == pytest.approx(92 * 2**20, rel=0.01)


@pytest.mark.slow
def test_two_experts_of_wan_share_the_steps_as_their_boundary_says() -> None:
    network = measure(CONFIGS / "wan2.2-t2v-14b", Workload(height=256, width=256, frames=5, steps=50))
    counts = {name: part(network, name).profiles[0].count for name in ("transformer", "transformer_2")}
    assert sum(counts.values()) == 100
    assert 0 < counts["transformer"] < counts["transformer_2"]


# ---- what is kept


@pytest.mark.parametrize("hooks_of", ["overflowml", "accelerate"])
def test_what_is_said_of_a_model_with_hooks_is_not_said_of_its_like(
    hooks_of: str, saved_pipeline: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_pipeline("stable_diffusion") / "vae"
    monkeypatch.setattr("overflowml_core.description._profiles", lambda: ProfileCache(tmp_path))
    hooked, plain = (df.AutoencoderKL.from_pretrained(folder) for _ in range(2))
    if hooks_of == "overflowml":
        overflowml.manage(hooked, smallest(folder))
    else:
        add_hook_to_module(hooked, ModelHook())
    assert overflowml.describe(hooked, SMALL).components[0].activation_source == "analytic"
    assert overflowml.describe(plain, SMALL).components[0].activation_source == "traced"
    # And what was traced once is known of the hooked one, too.
    assert overflowml.describe(hooked, SMALL).components == overflowml.describe(plain, SMALL).components
    overflowml.release(hooked)


# ---- stubs


@pytest.mark.parametrize(
    ("asked", "length"),
    [
        ({"padding": "max_length", "max_length": 33}, 33),
        ({"padding": "max_length"}, 77),
        ({"padding": True, "max_length": 20, "truncation": True}, 20),
        ({"padding": True, "max_length": 4000, "truncation": True}, 512),
        ({"padding": "longest"}, 8),
    ],
)
def test_stub_tokenizer_answers_with_the_length_that_is_asked(asked: dict[str, Any], length: int) -> None:
    encoding = StubTokenizer(512, 77)(["a", "b"], return_tensors="pt", **asked)
    assert encoding.input_ids.shape == encoding["attention_mask"].shape == (2, length)
    assert not encoding.input_ids.any()
    assert encoding.to("cpu").attention_mask.all()


def test_prompt_length_of_the_workload_reaches_pipelines_that_do_not_pad() -> None:
    from overflowml_diffusers.tokenizers import stub_for

    assert stub_for("tokenizer", {}, 40)("a", padding=True, max_length=1024, truncation=True, return_tensors="pt").input_ids.shape == (
        1,
        40,
    )
