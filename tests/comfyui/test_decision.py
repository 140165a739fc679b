"""Plans of live models and of files, and what they mean together."""

from __future__ import annotations

import time

import pytest
from flux_files import flux_shapes, live_flux, write_header

import overflowml
import overflowml_comfyui
from overflowml_comfyui.decision import FITS, REFUSED, SLOWER, Decision, decide_file, decide_module, over_budget
from overflowml_comfyui.report import picture_of, text_of
from overflowml_comfyui.request import request_of
from overflowml_core import session
from overflowml_core.facts import Accelerator, HostMemory, Machine, Rates

GIB = 2**30
_FIELDS = {"width": 1024, "height": 1024, "steps": 20}


def _machine(card_bytes=24 * GIB):
    card = Accelerator("cuda", "a card", 0, card_bytes, card_bytes, backend="cuda")
    return Machine((card,), HostMemory(64 * GIB, 48 * GIB, 32 * GIB, 8), Rates(25e9, 25e9, 3e9), 200 * GIB)


@pytest.fixture(autouse=True)
def _known_host():
    plugins = session.plugins()
    is_ours = "comfyui" not in plugins.names()
    if is_ours:
        plugins.register(overflowml_comfyui, "comfyui")
    yield
    if is_ours:
        plugins.manager.unregister(name="comfyui")


@pytest.fixture
def flux_file(tmp_path):
    path = tmp_path / "flux.safetensors"
    write_header(path, flux_shapes())
    return path


def test_a_full_size_file_is_planned_by_its_header_within_two_seconds(flux_file):
    began_s = time.process_time()
    part = decide_file(flux_file, request_of({**_FIELDS, "budget": "12GB"}), _machine())

    assert time.process_time() - began_s < 2
    assert part.verdict == SLOWER
    assert part.plan.weight_bytes == write_header(flux_file, flux_shapes())
    assert part.plan.estimate.device_peak_bytes <= 12 * 10**9


@pytest.mark.parametrize(("budget", "verdict"), [("30GB", FITS), ("12GB", SLOWER), ("100MB", REFUSED)])
def test_the_verdict_follows_the_budget(flux_file, budget, verdict):
    part = decide_file(flux_file, request_of({**_FIELDS, "budget": budget}), _machine(40 * GIB))

    assert part.verdict == verdict
    assert bool(part.refusal) == (verdict == REFUSED)


def test_a_refusal_names_the_file_and_the_field(flux_file):
    part = decide_file(flux_file, request_of({**_FIELDS, "budget": "100MB"}), _machine())

    assert part.refusal.startswith("flux.safetensors: needs at least")
    assert "give budget='" in part.refusal
    assert "overflow" not in part.refusal
    assert "quality" not in part.refusal


def test_a_live_model_of_the_host_has_the_plan_that_scripts_get():
    module, machine = live_flux(flux_shapes(256, 3, 6)), _machine()
    request = request_of({**_FIELDS, "budget": "1GB"})

    part = decide_module("model", module, request, machine)
    script = overflowml.plan(module, request.limits, request.workload, machine)

    assert part.plan.fingerprint == script.fingerprint
    assert part.network.fingerprint == script.network_fingerprint


def test_a_live_model_and_its_file_take_the_same_bytes(tmp_path):
    shapes, machine = flux_shapes(256, 3, 6), _machine()
    path = tmp_path / "small.safetensors"
    write_header(path, shapes)
    request = request_of({**_FIELDS, "budget": "1GB"})

    live, file = (one.plan for one in (decide_module("model", live_flux(shapes), request, machine), decide_file(path, request, machine)))

    assert live.weight_bytes == file.weight_bytes
    assert live.phases[0].activation_bytes == file.phases[0].activation_bytes > 0
    assert live.estimate.device_peak_bytes == pytest.approx(file.estimate.device_peak_bytes, rel=0.01)


def test_passes_belong_to_the_blocks_of_the_module():
    shapes = flux_shapes(256, 3, 6)
    single_first = {name: shapes[name] for name in sorted(shapes, reverse=True)}  # a module may register its lists in any order
    component = session.describe(live_flux(single_first), request_of(_FIELDS).workload).components[0]

    assert component.passes == 20
    assert component.blocks[0].name.startswith("single_blocks")
    for block, work in zip(component.blocks, component.profiles[0].blocks, strict=True):
        assert sum(one.weight_bytes for one in work.works) == pytest.approx(block.stored_bytes, rel=0.01)


def test_models_of_others_are_left_to_others():
    module = live_flux(flux_shapes(256, 1, 2), module="mine")

    assert overflowml_comfyui.overflowml_measure(module, None, None) is None


def test_over_budget_says_what_would_be_enough(flux_file):
    decision = Decision((decide_file(flux_file, request_of(_FIELDS), _machine(40 * GIB)),))

    assert over_budget(decision, decision.peak_bytes) == ""
    assert "raise it to" in over_budget(decision, 10**9)


def test_a_decision_is_as_bad_as_its_worst_part(flux_file):
    files = [decide_file(flux_file, request_of({**_FIELDS, "budget": size}), _machine(40 * GIB)) for size in ("30GB", "12GB", "9MB")]
    good, slower, refused = files

    assert Decision((good, slower)).verdict == SLOWER
    assert Decision((refused, slower, good)).verdict == REFUSED
    assert Decision(()).verdict == FITS


def test_the_report_has_the_numbers_of_the_plan(flux_file):
    part = decide_file(flux_file, request_of({**_FIELDS, "budget": "12GB"}), _machine())
    text, picture = text_of(Decision((part,)), "ENGINE"), picture_of(Decision((part,)))

    assert part.fingerprint in text
    assert "ENGINE" in text
    values = picture["parts"][0]
    assert values["fixed_bytes"] + values["resident_bytes"] + values["streamed_bytes"] == pytest.approx(part.plan.weight_bytes, rel=0.001)
    assert values["peak_bytes"] == part.plan.estimate.device_peak_bytes
