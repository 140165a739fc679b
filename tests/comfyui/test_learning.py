"""What runs teach: seconds of operations, the host's copies, what passes hold. And what they must not teach."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flux_files import flux_shapes, write_header

from overflowml_comfyui.decision import decide_file
from overflowml_comfyui.learning import link_bytes_per_s, taught_rates, with_host_links
from overflowml_comfyui.lowering import slow_sentences
from overflowml_comfyui.measurement import Measurement, Measurements
from overflowml_comfyui.request import request_of
from overflowml_core.facts import Accelerator, HostMemory, Machine, Rates
from overflowml_core.machine import ComputeRate

GIB = 2**30
_RATES = Rates(
    25e9,
    25e9,
    3e9,
    "measured",
    memory_bytes_per_s=1e12,
    compute=(ComputeRate("matmul", "BF16", 100e12), ComputeRate("attention", "BF16", 50e12)),
)
_FIELDS = {"width": 1024, "height": 1024, "steps": 20, "budget": "30GB"}


def _machine(rates=_RATES):
    card = Accelerator("cuda", "a card", 0, 40 * GIB, 40 * GIB, backend="cuda", rates=rates)
    return Machine((card,), HostMemory(64 * GIB, 48 * GIB, 32 * GIB, 8), rates, 200 * GIB)


@pytest.fixture
def flux(tmp_path):
    path = tmp_path / "flux.safetensors"
    write_header(path, flux_shapes())
    return path


def _decide(flux, rates=_RATES, recall=lambda _: None, **fields):
    return decide_file(flux, request_of({**_FIELDS, **fields}), _machine(rates), recall)


def _run(pass_s, **fields):
    return replace(Measurement(pass_s, 20, None, 20, 1), **fields)


@pytest.mark.parametrize("factor", [0.4, 1.7, 9.0])
def test_the_next_plan_predicts_what_the_last_run_took(flux, factor):
    part = _decide(flux)
    took_s = part.slowest.pass_s * factor
    taught = taught_rates(_RATES, part.component, _run(took_s), 1)

    assert _decide(flux, taught).slowest.pass_s == pytest.approx(took_s, rel=0.01)
    again = taught_rates(taught, part.component, _run(took_s), 1)
    assert again is taught


def test_another_size_is_predicted_as_before(flux):
    taught = taught_rates(_RATES, _decide(flux).component, _run(9.0), 1)

    assert _decide(flux, taught, width=512).slowest.pass_s == _decide(flux, width=512).slowest.pass_s


@pytest.mark.parametrize(
    "run",
    [
        _run(9.0, samples=2),  # guidance put two into a pass
        _run(9.0, streamed_bytes=GIB),  # it waited for weights
        _run(9.0, passes=0),  # not all passes were alike
        Measurement(9.0, 1, None, 1, 1),  # one pass sets things up
        _run(0.0),
    ],
)
def test_a_run_of_another_kind_teaches_no_seconds(flux, run):
    part = _decide(flux)

    assert taught_rates(_RATES, part.component, run, 1) is _RATES


def test_what_was_never_calibrated_stays_so(flux):
    assumed = replace(_RATES, source="assumed")

    assert taught_rates(assumed, _decide(flux).component, _run(9.0), 1) is assumed


def test_a_machine_that_slept_teaches_no_more_than_the_bound(flux):
    part = _decide(flux)
    taught = taught_rates(_RATES, part.component, _run(1e6), 1)

    assert _decide(flux, taught).slowest.pass_s < 60 * part.slowest.pass_s


def test_copies_are_as_fast_as_the_host_makes_them(flux):
    part = _decide(flux, budget="12GB")
    rate = link_bytes_per_s(_RATES, part.component, _run(2.0, streamed_bytes=20 * GIB))

    assert rate == 10 * GIB
    assert link_bytes_per_s(_RATES, part.component, _run(2.0)) == 0
    assert link_bytes_per_s(_RATES, part.component, _run(part.slowest.compute_s, streamed_bytes=20 * GIB)) == 0  # arithmetic hid them
    slower = with_host_links(_machine(), [0.0, 5e9, 10e9, 10e9, 10e9, 1e9])
    assert slower.rates_of(0).h2d_bytes_per_s == 10e9
    assert with_host_links(_machine(), []) == _machine()
    streamed = decide_file(flux, request_of({**_FIELDS, "budget": "12GB"}), slower)
    assert streamed.slowest.pass_s > part.slowest.pass_s


def test_the_next_plan_keeps_free_what_a_pass_really_held(flux):
    part = _decide(flux, budget="12GB")
    weights = part.plan.weight_bytes
    kept = {part.key: _run(2.0, peak_bytes=weights + 5 * GIB, resident_bytes=weights)}
    planned = _decide(flux, recall=kept.get, budget="12GB")

    assert planned.plan.phases[0].activation_bytes == 5 * GIB > part.plan.phases[0].activation_bytes
    assert planned.plan.estimate.device_peak_bytes <= 12 * 10**9
    assert _decide(flux, recall=kept.get, budget="12GB", width=512).measured is None


def test_a_peak_below_the_weights_is_none():
    assert _run(1.0, peak_bytes=5, resident_bytes=9).activation_bytes is None


def test_a_slow_step_is_explained_with_its_numbers(flux):
    one = _decide(flux).slowest
    streamed, longer = _run(3 * one.pass_s, streamed_bytes=6 * GIB), _run(3 * one.pass_s)

    assert slow_sentences(one, None) == ()
    assert slow_sentences(one, _run(one.pass_s)) == ()
    assert "6.00 GiB of weights were brought in for each call" in slow_sentences(one, streamed)[0]
    assert "3 times as long as predicted" in slow_sentences(one, longer)[0]
    twice = replace(_run(one.pass_s), step_s=2 * one.pass_s, passes=40)
    assert slow_sentences(one, twice)[0].startswith("A step called the model 2 times")


def test_runs_of_older_versions_are_read(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"a": {"step_s": 1.0, "steps": 4, "peak_bytes": null}}')

    assert Measurements(path).of("a") == Measurement(1.0, 4)
    Measurements(path).keep("b", Measurement(2.0, 4, None, 4, 1, 0, 10, 5e9))
    assert Measurements(path).links() == [5e9]
    path.write_text('{"a": {"step_s": 1.0, "steps": 4, "peak_bytes": null, "passes": -1}}')
    assert Measurements(path).of("a") is None
