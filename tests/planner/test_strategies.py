"""What is chosen, and what is said of the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Accelerator, ComputeRate, Limits, Rates, Workload
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan
from tests.planner.build import GIB, MIB, granted, llm, network
from tests.planner.build_timed import ALL, FP8, INT4, INT8, ONE_DEVICE, RATES, language, on, timed, vae

FORMATS = (FP8, INT8, INT4)


def _plan(net, mach=None, *, abilities=ONE_DEVICE, formats=FORMATS, work=None, **limits) -> Plan:
    return make_plan(net, mach or on(device=2**40), work or Workload(), Limits(**limits), formats, abilities)


def _rejected(plan: Plan) -> dict[str, object]:
    assert len({r.strategy for r in plan.rejected}) == len(plan.rejected)
    return {r.strategy: r for r in plan.rejected}


# ---- formats and quality


def test_bus_bound_tokens_take_a_format_that_fits_whole():
    plan = _plan(language(), device_memory="1200MiB")
    assert (plan.strategy, plan.quality, plan.formats) == ("direct fp8", "minimal", ("fp8",))
    assert plan.managed
    others = _rejected(plan)
    assert others["stream"].viable
    assert others["stream"].estimate.total_s > plan.estimate.total_s
    assert "times as long as direct fp8" in others["stream"].reason
    assert not others["direct"].viable
    assert others["direct"].reason == "needs 2.00 GiB of 1.17 GiB"
    assert Plan.from_json(plan.to_json()) == plan


def test_what_is_lossless_wins_where_streaming_costs_nothing():
    net = network(timed("model", [200 * MIB] * 8, [1.0] * 8, 20, linear=True))
    plan = _plan(net, device_memory="1000MiB")
    assert (plan.strategy, plan.quality) == ("stream", "lossless")
    assert plan.estimate.stall_s == pytest.approx(0, abs=1e-9)
    assert _rejected(plan)["direct fp8"].reason.endswith("as long as stream")


@pytest.mark.parametrize(("quality", "strategy"), [("lossless", "stream"), ("minimal", "direct fp8"), ("any", "direct int4")])
def test_the_quality_asked_for_bounds_the_choice(quality, strategy):
    memory_bound = tuple(replace(f, decode_bytes_per_s=0.0) for f in FORMATS)
    plan = _plan(language(), formats=memory_bound, device_memory="1200MiB", quality=quality)
    assert plan.strategy == strategy
    for other in plan.rejected:
        if other.viable and other.quality == "any" and quality != "any":
            assert other.reason.startswith(f"changes the result more than quality='{quality}' permits")


def test_a_loss_that_was_not_granted_is_not_taken_as_a_last_resort_but_named():
    net = network(timed("model", [800 * MIB] * 3, [0.1] * 3, 5, linear=True))
    with pytest.raises(DoesNotFit) as caught:
        _plan(net, formats=(INT4,), device_memory="700MiB")
    assert [m.strategy for m in caught.value.near_misses if m.remedy == "quality='any'"] == ["direct int4"]
    assert _plan(net, formats=(INT4,), device_memory="700MiB", quality="any").quality == "any"


def test_what_cannot_be_carried_out_is_told_and_not_taken():
    plan = _plan(language(), abilities=frozenset(), device_memory="1200MiB")
    assert plan.strategy == "stream"
    other = _rejected(plan)["direct fp8"]
    assert (other.viable, other.carried_out) == (True, False)
    assert other.estimate.total_s < plan.estimate.total_s
    assert other.reason.startswith("this version does not carry it out yet; ")
    assert other.reason.endswith("% faster")


@pytest.mark.parametrize(
    ("excluded", "strategy"),
    [
        ({("fp8", "*")}, "direct int8"),
        ({("fp8", "device")}, "direct int8"),
        ({("fp8", "pinned")}, "direct fp8"),
        ({("fp8", "*"), ("int8", "*")}, "stream"),
        ({("strategy", "direct fp8")}, "direct int8"),
        ({("strategy", "direct"), ("fp8", "pinned"), ("int8", "pinned")}, "stream"),
    ],
)
def test_what_is_excluded_is_left_out(excluded, strategy):
    plan = _plan(language(), device_memory="1200MiB", excluded=frozenset(excluded))
    assert plan.strategy == strategy
    for other in plan.rejected:
        if other.reason.startswith("excluded"):
            assert not other.viable


def test_phases_take_turns_where_they_may_not_stay_together():
    net = network(timed("encoder", [100 * MIB], [0.1]), timed("model", [100 * MIB] * 2, [0.1] * 2, 4))
    assert _plan(net, formats=()).strategy == "direct"
    assert _plan(net, formats=(), excluded=frozenset({("strategy", "direct")})).strategy in ("phased", "stream")


def test_where_all_is_excluded_the_error_says_so():
    with pytest.raises(DoesNotFit, match="everything that fits is excluded"):
        _plan(language(), formats=(), excluded=frozenset({("strategy", "direct"), ("strategy", "sequential")}))


def test_only_the_heaviest_phase_is_converted_where_that_is_enough():
    encoder = timed("encoder", [100 * MIB] * 2, [0.01] * 2, linear=True)
    model = timed("model", [400 * MIB] * 4, [0.001] * 4, 30, linear=True)
    slow = replace(FP8, decode_bytes_per_s=1e10)
    plan = _plan(network(encoder, model), formats=(slow,), device_memory="1100MiB")
    assert plan.strategy == "direct fp8"
    assert {p.format for p in plan.phase_of("encoder").placements} == {""}
    assert {p.format for p in plan.phase_of("model").placements} == {"fp8"}


# ---- variants


@pytest.mark.parametrize(
    ("budget", "variant", "quality"),
    [("5GiB", "", "lossless"), ("3GiB", "slicing", "lossless"), ("1GiB", "tiling", "minimal")],
)
def test_a_variant_is_switched_on_exactly_when_the_budget_needs_it(budget, variant, quality):
    plan = _plan(network(vae()), device_memory=budget)
    assert (plan.phases[0].variant, plan.quality) == (variant, quality)
    assert ("is switched on" in " ".join(plan.reasons)) == bool(variant)
    assert plan.managed == bool(variant)
    assert plan.estimate.device_peak_bytes <= plan.budget.device_bytes


def test_tiles_are_not_lossless():
    with pytest.raises(DoesNotFit):
        _plan(network(vae()), device_memory="1GiB", quality="lossless")
    with pytest.raises(DoesNotFit):
        _plan(network(vae()), device_memory="1GiB", excluded=frozenset({("variant", "tiling")}))
    assert _plan(network(vae()), device_memory="3GiB", excluded=frozenset({("variant", "slicing")})).phases[0].variant == "tiling"


def test_weights_are_streamed_before_tiles_are_used():
    """As it is the phase fits with its weights streamed: the budget does not need what changes the result."""
    one = replace(vae(as_is=GIB, sliced=GIB, tiled=GIB // 2, weights=10 * MIB), variants=vae(GIB, GIB, GIB // 2).variants[:1])
    big = timed("vae", [100 * MIB] * 5, [0.1] * 5, activations=GIB)
    plan = _plan(network(replace(big, variants=one.variants)), device_memory="1200MiB")
    assert (plan.phases[0].variant, plan.kind) == ("", "stream")


def test_a_variant_that_cannot_be_carried_out_is_told():
    net = network(vae())
    with pytest.raises(DoesNotFit) as caught:
        _plan(net, abilities=frozenset(), device_memory="3GiB")
    assert "smaller reserve or workload" in str(caught.value)


# ---- other devices


def _two(first_bytes: int, second_bytes: int):
    mach = on(device=first_bytes)
    faster = replace(RATES, compute=(ComputeRate("matmul", "BF16", 4e12),))
    return replace(mach, accelerators=(*mach.accelerators, Accelerator("cuda", "Other", 1, second_bytes, second_bytes, rates=faster)))


def test_two_cards_hold_what_one_cannot():
    net = language(blocks=10)
    plan = _plan(net, _two(2 * GIB, 3 * GIB), abilities=ALL, formats=())
    assert plan.strategy == "devices"
    assert plan.devices == ("cuda:0", "cuda:1")
    devices = [p.device for p in plan.placements()]
    assert devices == sorted(devices)
    assert set(devices) == {0, 1}
    assert not plan.estimate.streamed_bytes
    assert all(plan.phases[0].bytes_on(i) <= granted_bytes for i, granted_bytes in enumerate(plan.budget.each_bytes))
    assert Plan.from_json(plan.to_json()) == plan
    alone = _plan(net, _two(2 * GIB, 3 * GIB), formats=())
    assert alone.strategy == "stream"
    assert _rejected(alone)["devices"].carried_out is False


def test_each_of_two_cards_streams_its_own_overflow():
    plan = _plan(language(blocks=30), _two(2 * GIB, 3 * GIB), abilities=ALL, formats=())
    assert plan.strategy == "devices"
    assert {p.device for p in plan.phases[0].streamed} == {0, 1}
    alone = _plan(language(blocks=30), _two(2 * GIB, 3 * GIB), formats=())
    assert plan.estimate.total_s < alone.estimate.total_s


def test_the_cpu_is_compared_where_its_rates_are_known():
    cpu = Rates(0, 0, 0, memory_bytes_per_s=50e9, compute=(ComputeRate("matmul", "BF16", 1e11),))
    net = language()
    plan = _plan(net, replace(on(device=2**40), cpu_rates=cpu), formats=(), device_memory="1200MiB")
    other = _rejected(plan)["cpu"]
    assert (other.viable, other.carried_out) == (True, False)
    prefill_s, token_s = 8 * 0.02 * 10, 8 * 256 * MIB / 50e9
    assert other.estimate.total_s == pytest.approx(prefill_s + 16 * token_s)
    slow_link = replace(RATES, h2d_bytes_per_s=1e8)
    there = _plan(net, replace(on(slow_link, device=2**40), cpu_rates=cpu), abilities=ALL, formats=(), device_memory="1200MiB")
    assert (there.strategy, there.device) == ("cpu", "cpu")
    assert there.estimate.streamed_bytes == 0
    assert _rejected(_plan(net, device_memory="1200MiB"))["cpu"].reason.endswith("nobody knows how fast this CPU computes")


# ---- times


def test_a_language_model_tells_its_first_token_and_the_others():
    plan = _plan(language(blocks=4, tokens=10), formats=())
    token_s, prefill_s = 4 * 256 * MIB / 1e12, 4 * 0.02
    assert plan.strategy == "direct"
    assert plan.estimate.first_token_s == pytest.approx(prefill_s)
    assert plan.estimate.token_s == pytest.approx(token_s)
    assert plan.estimate.total_s == pytest.approx(prefill_s + 10 * token_s)
    prefill, token = plan.phases[0].passes
    assert (prefill.name, prefill.bound_by, token.name, token.bound_by, token.count) == ("prefill", "compute", "token", "memory", 10)
    assert "tokens a second" in plan.summary()


def test_components_that_nobody_profiled_make_no_times_up():
    plan = _plan(llm(), on(device=2**40), formats=(), device_memory="8GiB")
    assert (plan.estimate.total_s, plan.estimate.pass_s) == (None, None)
    assert plan.estimate.transfer_s is not None


def test_phases_that_take_turns_pay_for_coming_in():
    encoder, model = timed("encoder", [100 * MIB] * 2, [0.5] * 2), timed("model", [100 * MIB] * 3, [0.5] * 3, 4)
    plan = _plan(network(encoder, model), formats=(), device_memory="320MiB")
    assert plan.kind in ("phased", "stream")
    compute_s = 2 * 0.5 + 4 * 3 * 0.5
    assert compute_s < plan.estimate.total_s <= compute_s + 5 * 100 * MIB / 1e9 + 1e-9


def test_reasons_can_be_checked_line_by_line():
    plan = _plan(language(), formats=(), device_memory="1200MiB")
    text = "\n".join(plan.reasons)
    for words in (
        "as asked",
        "traced on fake tensors",
        "copies to the device bound",
        "tokens a second",
        "measured rates",
        "a unit of work",
    ):
        assert words in text
    assert plan.rates == RATES


def test_measured_operations_stay_out_of_the_plan():
    plan = _plan(language(), on(replace(RATES, op_seconds=(("mm", 1.0),)), device=2**40))
    assert plan.rates.op_seconds == ()


def test_a_budget_of_nothing_is_refused_with_profiles_too():
    with pytest.raises(DoesNotFit):
        make_plan(language(), on(device=2**40), Workload(), granted(1), FORMATS, ALL - {"devices"})
