"""A VAE that decodes in slices or tiles takes less: by how much is traced, and a plan that says so is carried out and taken back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

import overflowml
import overflowml_diffusers
from overflowml_core import session
from overflowml_core.facts import Component, PassProfile, Workload
from overflowml_core.runtime.fake import Call, tracing
from overflowml_diffusers import profile
from overflowml_diffusers.replay import fake_of
from overflowml_diffusers.twin import twin_module
from overflowml_diffusers.variants import turn_on
from tests.hosts import pipelines
from tests.hosts.check import assert_same, smallest

Saved = Callable[..., Path]


def measured(source: Any, workload: Workload, name: str = "model") -> Component:
    network = overflowml_diffusers.overflowml_describe(source=source, workload=workload, options={})
    assert network is not None
    profiled = overflowml_diffusers.overflowml_measure(source=source, network=network, workload=workload, options={})
    assert profiled is not None
    return next(c for c in profiled.components if c.name == name)


def whole_trace(vae: Any, variant: str, shape: tuple[int, ...]) -> Call:
    """The decode with the variant on, every tile traced by itself."""
    with tracing() as tracer:
        twin = twin_module(vae)
        turn_on(twin, variant)
        tracer.watch("vae", twin, ("decode",))
        twin.decode(fake_of(twin).new_empty(shape), return_dict=False)
        return tracer.calls[-1]


def convolved(profile: PassProfile) -> int:
    works = [*profile.outside, *(work for block in profile.blocks for work in block.works)]
    return sum(work.flop for work in works if work.kind == "conv")


def image_vae(**changes: Any) -> Any:
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "sample_size": 32,
    }
    return df.AutoencoderKL(**{**config, **changes}).eval()


def test_variants_of_a_batch() -> None:
    component = measured(image_vae(), Workload(height=96, width=96, batch=3))
    plain = component.profiles[0]
    assert [(v.name, v.lossless) for v in component.variants] == [("slicing", True), ("tiling", False), ("slicing+tiling", False)]
    peaks = [component.activation_bytes, *(v.profiles[0].activation_bytes for v in component.variants)]
    assert peaks == sorted(set(peaks), reverse=True)
    slicing, tiling = component.variants[0].profiles[0], component.variants[1].profiles[0]
    assert slicing.flop == plain.flop
    # Tiles overlap, so that more is convolved; attention within tiles is less than in the whole.
    assert convolved(tiling) > convolved(plain) == convolved(slicing)
    assert all(p.source == "traced" and p.count == plain.count and p.name == plain.name for v in component.variants for p in v.profiles)


def test_single_picture_has_no_slices() -> None:
    assert [v.name for v in measured(image_vae(), Workload(height=128, width=128)).variants] == ["tiling"]


def test_picture_smaller_than_a_tile_has_no_variants() -> None:
    assert measured(image_vae(), Workload(height=32, width=32)).variants == ()


def test_what_is_on_already_is_no_variant() -> None:
    vae = image_vae()
    vae.enable_tiling()
    assert measured(vae, Workload(height=128, width=128)).variants == ()


def test_other_models_have_no_variants() -> None:
    pipe = pipelines.build("flux")
    assert measured(pipe.transformer, Workload(height=64, width=64)).variants == ()


@pytest.mark.parametrize("name", ["wan", "sdxl"])
def test_nothing_that_the_pipeline_left_is_freed_while_variants_are_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers are parts of reference cycles: collected in the middle of a variant's trace, they made it seem to take less."""
    looked = profile.find_variants
    freed_bytes: list[int] = []

    def find(traced: Any, calls: Any) -> Any:
        memory = traced._tracer.memory
        before = memory.current
        gc.collect()
        freed_bytes.append(before - memory.current)
        return looked(traced, calls)

    monkeypatch.setattr(profile, "find_variants", find)
    gc.disable()
    try:
        measured(pipelines.build(name), Workload(height=32, width=32, frames=5, steps=2), "vae")
    finally:
        gc.enable()
    assert freed_bytes == [0]


def test_variants_of_a_pipeline_hold_what_it_holds_beside_the_vae() -> None:
    pipe = pipelines.build("sd3")
    workload = Workload(height=128, width=128, steps=2)
    alone, inside = measured(pipe.vae, workload), measured(pipe, workload, "vae")
    assert [v.name for v in inside.variants] == ["tiling"]
    assert inside.variants[0].profiles[0].activation_bytes > 0
    assert inside.profiles[0].name == alone.profiles[0].name == "decode"


@pytest.mark.parametrize("variant", ["slicing", "tiling", "slicing+tiling"])
def test_tiles_are_traced_once_and_counted_exactly(variant: str) -> None:
    vae = image_vae()
    component = measured(vae, Workload(height=80, width=56, batch=2))
    found = next(v for v in component.variants if v.name == variant).profiles[0]
    whole = whole_trace(vae, variant, (2, 4, 40, 28))
    assert found.activation_bytes == whole.activation_bytes
    assert found.flop == whole.flop
    assert [b.calls for b in found.blocks] == [b.calls for b in whole.blocks]
    ours = [w for b in found.blocks for w in b.works] + list(found.outside)
    theirs = [w for b in whole.blocks for w in b.works] + list(whole.outside)
    assert sum(w.traffic_bytes for w in ours) == sum(w.traffic_bytes for w in theirs)
    assert sum(w.calls for w in ours) == sum(w.calls for w in theirs)


def test_tiles_of_a_clip_are_counted_exactly() -> None:
    vae = df.AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_height=48, tile_sample_stride_width=48)
    vae.disable_tiling()
    component = measured(vae, Workload(height=96, width=64, frames=9))
    whole = whole_trace(vae, "tiling", (1, 16, 3, 12, 8))
    (found,) = component.variants
    assert (found.profiles[0].activation_bytes, found.profiles[0].flop) == (whole.activation_bytes, whole.flop)


@pytest.mark.parametrize("variant", ["slicing", "tiling", "slicing+tiling"])
def test_switches_come_back_to_what_they_were(variant: str) -> None:
    vae = image_vae()
    vae.enable_slicing()
    restore = turn_on(vae, variant)
    assert vae.use_slicing
    assert vae.use_tiling == ("tiling" in variant)
    restore()
    assert (vae.use_slicing, vae.use_tiling) == (True, False)


def test_plan_switches_its_variant_on_and_the_release_off(saved_pipeline: Saved) -> None:
    folder, options = saved_pipeline("stable_diffusion"), pipelines.without_tokenizers("stable_diffusion")
    pipe = df.DiffusionPipeline.from_pretrained(folder, **options)
    limits = smallest(folder, **options)
    plan = overflowml.plan(pipe, overflow=limits)
    tiled = replace(
        plan, phases=tuple(replace(p, variant="tiling") if p.components == ("vae",) else p for p in plan.phases), fingerprint=""
    )
    assert tiled.managed
    attached = session.manage(pipe, limits, plan=tiled)
    assert pipe.vae.use_tiling
    assert not pipe.vae.use_slicing
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = pipe.vae.decode(latents)
    assert attached.plan.phase_of("vae") is not None
    assert overflowml.release(pipe)
    assert not pipe.vae.use_tiling
    pipe.vae.enable_tiling()
    with torch.no_grad():
        assert_same(ours, pipe.vae.decode(latents))
