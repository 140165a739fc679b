"""A plan as the host's numbers, and its limits as words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_comfyui.lowering import DeviceState, flag_advice, limit_sentence, reserve_bytes
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import Budget, Estimate, PassEstimate, PhasePlan, Plan

GIB = 2**30


def _plan(budget_bytes, activation_bytes):
    phase = PhasePlan("model", ("model",), 0, Tier.DEVICE, 0, 0, activation_bytes, (), Estimate())
    budget = Budget(budget_bytes, 0, 0)
    return Plan("direct", "Flux", "f", 1, "cuda", "a card", Workload(), Limits(), budget, (phase,), Estimate())


def _weights_bytes(state, reserve):
    """What the estimating engine fills with weights (ComfyUI 0.33, model_management.load_models_gpu)."""
    return max(state.free_bytes - (state.estimate_bytes + reserve), 0)


def test_weights_and_activations_keep_the_budget():
    state = DeviceState(20 * GIB, 2 * GIB, GIB // 2)
    reserve = reserve_bytes(_plan(12 * GIB, 2 * GIB), state, is_capped=True)

    assert _weights_bytes(state, reserve) + state.estimate_bytes + state.reserved_bytes == 12 * GIB


def test_without_a_budget_the_host_keeps_its_own_reserve():
    assert reserve_bytes(_plan(12 * GIB, GIB), DeviceState(20 * GIB, 2 * GIB, GIB // 2), is_capped=False) == GIB // 2


def test_activations_beyond_the_hosts_estimate_are_kept_free():
    state = DeviceState(20 * GIB, 2 * GIB, GIB // 2)

    assert reserve_bytes(_plan(30 * GIB, 5 * GIB), state, is_capped=True) == GIB // 2 + 3 * GIB


_sizes = st.integers(0, 2**40)


@given(_sizes, _sizes, _sizes, _sizes, _sizes, st.booleans())
def test_the_reserve_is_never_below_the_hosts_and_keeps_the_budget(budget, activations, free, estimate, reserved, capped):
    state = DeviceState(free, estimate, reserved)
    reserve = reserve_bytes(_plan(budget, activations), state, capped)

    assert reserve >= reserved
    if capped:
        assert _weights_bytes(state, reserve) <= max(budget - max(activations, estimate), 0)


@pytest.mark.parametrize(("bound_by", "words"), [("compute", "arithmetic"), ("link", "copies of weights"), ("disk", "reads of weights")])
def test_the_limit_is_named_with_its_numbers(bound_by, words):
    sentence = limit_sentence(PassEstimate("model", "denoise", 20, 0, 1.5, 1.25, 1.4, 0.25, bound_by), 11 * GIB)

    assert words in sentence
    assert "1.2 s of computing" in sentence
    assert "1.4 s of copies (11.00 GiB)" in sentence
    assert "250 ms of waiting" in sentence


def test_an_unknown_limit_says_how_to_know_it():
    assert "Calibrate" in limit_sentence(None)
    assert "Calibrate" in limit_sentence(PassEstimate("model", "denoise", 20, 0))


def test_flags_are_named_where_they_slow_down_what_limits():
    flags = {"disable_pinned_memory": True, "lowvram": True, "reserve_vram": None, "fast_disk": False}

    assert [line.split()[0] for line in flag_advice("link", flags)] == ["--disable-pinned-memory", "--lowvram"]
    assert flag_advice("compute", flags) == ()
    assert "--fast-disk" in flag_advice("disk", flags)[0]
    assert flag_advice("disk", {}) == ()  # a host that has no such flag
    assert "--reserve-vram 4" in flag_advice("link", {"reserve_vram": 4.0})[0]
