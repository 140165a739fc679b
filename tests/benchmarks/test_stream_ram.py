"""The ram part on the virtual accelerator: the peers' real code and ours, on models of a few MB."""

# ruff: noqa: E402 -- only where there is torch

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import stream_ram
from report import Report
from stream_ram import Settings, Turns, add_figures, run_steps
from stream_subjects import LLAMA_70B, flux, layers_in, llama

import overflowml
from overflowml_core import planning, session
from overflowml_core.facts import Accelerator
from tests.vdevice import Config, install

BUDGET_BYTES = 2_500_000


@pytest.fixture
def vgpu(monkeypatch):
    device = install(Config(budget_bytes=2**30, hazards="raise", launch_s=1e-6))
    machine = replace(overflowml.detect(), accelerators=(Accelerator("vgpu", "virtual accelerator", 0, 2**30, 2**30),))
    monkeypatch.setattr(session, "detect", lambda: machine)
    monkeypatch.setattr(planning, "detect", lambda: machine)
    return device


def _figures(report):
    return {figure["name"]: figure["value"] for figure in report.figures}


def test_all_sides_take_turns_and_ours_keeps_the_budget(vgpu):
    settings = Settings(torch.device("vgpu"), (("2500KB", BUDGET_BYTES),), 300_000, edge=32, steps=1, rounds=1, soak=0, small=True)
    report, notes = Report("stream"), []
    text = stream_ram._measure(flux(settings.device, settings.edge, small=True), settings, report, notes)
    found = _figures(report)
    assert [note for note in notes if "mmgp" not in note] == ["ram.soak: left out; give --soak 20 or more"]
    assert found["ram.link_rate"] == pytest.approx(vgpu.config.h2d_bytes_per_s)
    assert found["ram.2500KB.streamed_bytes"] > 0
    assert found["ram.2500KB.peak_over_budget"] <= 1
    assert found["ram.2500KB.max_abs_difference"] == 0
    assert found["ram.2500KB.vs_sequential"] > 1
    assert found["ram.2500KB.vs_group"] > 1
    assert all(f"| {name} |" in text for name in ("resident", "sequential", "group_block", "group_leaf", "ours"))
    assert not vgpu.hazards


def test_a_long_run_on_the_cpu_neither_grows_nor_is_left_out():
    settings = Settings(torch.device("cpu"), (("1GB", 10**9),), 10**8, edge=32, steps=1, rounds=1, soak=20, small=True)
    report, notes = Report("stream"), []
    stream_ram._measure(llama(settings.device, 2**30, small=True), settings, report, notes)
    found = _figures(report)
    assert notes == []
    assert found["ram.llama.soak.passes"] == 20
    assert found["ram.llama.1GB.max_abs_difference"] == 0


def test_a_shell_shares_the_weights_and_nothing_else():
    subject = llama(torch.device("cpu"), 2**30, small=True)
    shell = subject.shell()
    for mine, theirs in zip(subject.model.parameters(), shell.parameters(), strict=True):
        assert mine is not theirs
        assert mine.data_ptr() == theirs.data_ptr()
    shell.model.layers[0].mlp.up_proj.weight.data = torch.zeros(1)
    assert subject.model.model.layers[0].mlp.up_proj.weight.numel() > 1
    first = run_steps(subject.shell(), subject, torch.device("cpu"), 1)[1]
    assert torch.equal(first, run_steps(subject.shell(), subject, torch.device("cpu"), 1)[1])


def test_layers_of_a_70b_fit_the_room():
    assert layers_in(140 * 10**9, LLAMA_70B) == 81
    assert layers_in(0, LLAMA_70B) == 2


def test_a_peer_counts_by_its_fastest_way_within_the_budget():
    subject = llama(torch.device("cpu"), 2**30, small=True)
    settings = Settings(torch.device("cpu"), (("1GB", 10**9),), 10**8)
    turns = {
        ("ours", "1GB"): Turns([2.0], 9 * 10**8, streamed_bytes=4000),
        ("group_block", ""): Turns([5.0], 10**8),
        ("group_leaf", ""): Turns([3.0], 2 * 10**9),
        ("resident", ""): Turns([1.0], 3 * 10**9),
        ("mmgp", "1GB"): Turns(error="not there"),
    }
    report = Report("stream")
    add_figures(report, subject, settings, turns, rate_bytes_per_s=2500.0)
    found = _figures(report)
    assert found["ram.llama.1GB.vs_group"] == 2.5
    assert found["ram.llama.1GB.over_limit"] == pytest.approx(2.0 / 1.6)
    assert found["ram.llama.1GB.peak_over_budget"] == 0.9
    assert "ram.llama.1GB.vs_mmgp" not in found
