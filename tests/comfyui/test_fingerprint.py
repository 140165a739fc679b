"""One plan, whoever makes it: a bare module, a diffusers pipeline, a file, and ComfyUI (test_host.py has that one)."""

from __future__ import annotations

import pytest
from flux_files import flux_shapes, live_flux, write_header
from sd3_files import BUDGETS, asked, machine, write_sd3

import overflowml
from overflowml_comfyui.decision import decide_file
from overflowml_comfyui.request import Request
from overflowml_core.facts import Tier


def _denoiser(network):
    return max(network.components, key=lambda one: (one.passes, one.weight_bytes))


def test_a_module_a_pipeline_and_their_file_have_one_fingerprint(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    path = write_sd3(tmp_path)
    module = diffusers.SD3Transformer2DModel.from_single_file(str(path), config=str(tmp_path), subfolder="transformer")
    rest = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=module, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, **rest
    )
    found = {}
    for budget in BUDGETS:
        limits, workload = asked(budget)
        plans = [
            (source, overflowml.plan(source, limits, workload, machine()), _denoiser(overflowml.describe(source, workload)))
            for source in (module, pipeline, path)
        ]
        found[budget] = {plan.component_fingerprint(component) for _, plan, component in plans}
        request = Request(workload, limits.device_bytes, limits.reserve_bytes)
        assert decide_file(path, request, machine()).fingerprint in found[budget]
        tiers = {place.tier for _, plan, _ in plans for place in plan.placements()}
        assert tiers == ({Tier.DEVICE} if budget == BUDGETS[1] else {Tier.PINNED})
        assert len({plan.fingerprint for _, plan, _ in plans}) == 3  # which names classes and tensors

    assert [len(found[budget]) for budget in BUDGETS] == [1, 1]
    assert found[BUDGETS[0]] != found[BUDGETS[1]]


def _of(source, dtype_budget="1GB", **sizes):
    workload = overflowml.Workload(**{"height": 512, "width": 512, "steps": 4, **sizes})
    limits = overflowml.Limits(device_memory=dtype_budget, reserve="100MB", quality="lossless")
    return overflowml.plan(source, limits, workload, machine()).component_fingerprint(_denoiser(overflowml.describe(source, workload)))


def test_other_weights_another_request_and_another_decision_have_others(tmp_path):
    shapes = flux_shapes(256, 3, 6)
    for name, made, dtype in (("a", shapes, "BF16"), ("wide", flux_shapes(384, 3, 6), "BF16"), ("f32", shapes, "F32")):
        write_header(tmp_path / f"{name}.safetensors", made, dtype)
    file = tmp_path / "a.safetensors"

    assert _of(file) == _of(live_flux(shapes))
    different = [
        _of(file),
        _of(tmp_path / "wide.safetensors"),
        _of(tmp_path / "f32.safetensors"),
        _of(file, height=256),
        _of(file, "120MB"),
        _of(file, "900MB"),
    ]
    assert len(set(different)) == len(different)
