"""The cuda part of the benchmark of mixtures of experts, on the virtual accelerator and on the CPU, with a model of 3 MB."""

# ruff: noqa: E402 -- only where there is torch

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import moe
import moe_cuda
from moe_cuda import FULL, SMALL, Answers, Settings, add_figures, layers_in, make_live
from moe_trace import Pass, Trace
from report import Report

import overflowml
from overflowml_core import planning, session
from overflowml_core.expert_report import BankReport, ExpertReport
from overflowml_core.facts import Accelerator
from tests.vdevice import Config, install


def figures(report):
    return {figure["name"]: figure["value"] for figure in report.figures}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def vgpu(monkeypatch):
    device = install(Config(budget_bytes=2**30, hazards="raise", launch_s=1e-6))
    machine = replace(overflowml.detect(), accelerators=(Accelerator("vgpu", "virtual accelerator", 0, 2**30, 2**30),))
    monkeypatch.setattr(session, "detect", lambda: machine)
    monkeypatch.setattr(planning, "detect", lambda: machine)
    return device


def check(found, notes):
    assert notes == []
    assert found["cuda.weights_bytes"] > found["cuda.budget_bytes"] == 2_000_000
    assert found["cuda.max_abs_difference"] <= 0.02
    assert 0 < found["cuda.cache.hit_rate"] <= found["cuda.cache.hit_rate_optimum"] <= 1
    assert found["cuda.fetched_bytes"] > 0


def test_ours_and_resident_on_the_virtual_accelerator(vgpu):
    report, notes = Report("moe"), []
    settings = Settings(torch.device("vgpu"), 2_000_000, SMALL, 12, 4, 1)
    ((_, text),) = moe_cuda.measure(settings, report, notes)
    found = figures(report)
    check(found, notes)
    assert found["cuda.link_rate"] == pytest.approx(vgpu.config.h2d_bytes_per_s)
    assert found["cuda.share_of_limit"] > 0
    assert found["cuda.ours.peak_bytes"] <= 2_000_000 < found["cuda.resident.peak_bytes"]
    assert "| ours |" in text
    assert "| resident |" in text
    assert not vgpu.hazards


def test_the_script_is_tried_on_a_cpu():
    settings = moe_cuda.settings_of(moe.parser().parse_args(["--device", "cpu", "--prompt", "12", "--new", "4", "--turns", "1"]))
    report, notes = Report("moe"), []
    moe_cuda.measure(settings, report, notes)
    check(figures(report), notes)


def test_a_side_that_fails_says_so_and_the_others_go_on(monkeypatch):
    def broken(model, settings):
        raise MemoryError("no room")

    monkeypatch.setattr(moe_cuda, "ours", broken)
    report, notes = Report("moe"), []
    moe_cuda.measure(Settings(torch.device("cpu"), 2_000_000, SMALL, 8, 1, 0), report, notes)
    assert notes == ["cuda.ours: MemoryError: no room"]
    assert figures(report)["cuda.weights_bytes"] > 2_000_000


def test_layers_fit_the_ram_twice():
    layer_bytes = 1_246_000_000
    assert layers_in(150 * 10**9, FULL) == 48
    assert layers_in(2 * (1_250_000_000 + 10 * layer_bytes), FULL) == 10
    assert layers_in(0, FULL) == 1


def test_the_live_model_is_the_class_itself_with_all_weights_drawn():
    model = make_live(SMALL, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(not buffer.is_meta for buffer in model.buffers())
    gate = model.model.layers[0].mlp.gate.weight
    assert gate.float().std() > 0
    assert not torch.equal(gate, model.model.layers[1].mlp.gate.weight)


def test_figures_by_hand():
    def counted(requests, hits, ahead, fetched_bytes):
        bank = BankReport("", "b", 2, 10, requests, hits, fetched_bytes, (1,))
        return ExpertReport((bank,), 1, 1, 3, 10, 0.0, ahead, ahead, 0)

    trace = Trace(2, 1, (Pass(1, ({0: 1},)), Pass(1, ({0: 1},))))
    mine = Answers([2.0], [0.5, 0.5], [torch.tensor([1.0])], 9, [trace], [(counted(10, 5, 1, 100), counted(30, 21, 2, 500))])
    theirs = Answers([4.0], [2.0], [torch.tensor([1.0])], 9)
    whole = Answers([1.0], [0.1], [torch.tensor([1.5])], 9)
    report = Report("moe")
    add_figures(report, {"ours": mine, "accelerate": theirs, "resident": whole}, rate_bytes_per_s=1000.0)
    found = figures(report)
    assert found["cuda.decode.vs_accelerate"] == 4.0
    assert found["cuda.prefill.vs_accelerate"] == 2.0
    assert found["cuda.cache.hit_rate"] == 16 / 20
    assert found["cuda.cache.hit_rate_optimum"] == 0.5
    assert found["cuda.fetched_bytes"] == 200
    assert found["cuda.share_of_limit"] == pytest.approx(0.4)
    assert found["cuda.max_abs_difference"] == 0.5
