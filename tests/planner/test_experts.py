"""Plans that keep routed experts apart: what stays, what is cached, where the others wait, and what that takes, reckoned by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from overflowml_core.errors import BadPlan, DoesNotFit
from overflowml_core.facts import Block, Component, ComputeRate, Experts, Limits, Linear, Machine, Network, Rates, Tier, Workload
from overflowml_core.formats import PartSize
from overflowml_core.plan import PassEstimate, Plan
from overflowml_core.planner import make_plan
from overflowml_core.planner.expert_hits import asked_of
from overflowml_core.planner.expert_pace import cpu_bytes_per_s, fetch_bytes_per_s
from tests.planner.build import GIB, MIB, network
from tests.planner.build_timed import (
    ALL,
    DISK_BYTES_PER_S,
    FP8,
    INT8,
    LINK_BYTES_PER_S,
    MEMORY_BYTES_PER_S,
    ONE_DEVICE,
    RATES,
    mixture,
    on,
)

EXPERT = 8 * MIB
DENSE = 32 * MIB + 4 * 64 * MIB + 16 * MIB
"""Of :func:`mixture`: fixed weights, four blocks without their experts, activations."""
TOKENS = Workload(prompt_tokens=64, new_tokens=33)


def _plan(net: Network, mach: Machine | None = None, *, abilities=ONE_DEVICE, formats=(), work=TOKENS, **limits) -> Plan:
    return make_plan(net, mach or on(device=2**40), work, Limits(**limits), formats, abilities)


def _rejected(plan: Plan):
    return {r.strategy: r for r in plan.rejected}


def _token(plan: Plan) -> PassEstimate:
    return next(one for one in plan.phases[0].passes if one.name == "token")


def _with(net: Network, **changes) -> Network:
    """The network with its banks changed."""
    (part,) = net.components
    blocks = tuple(replace(b, experts=replace(b.experts, **changes)) if b.experts is not None else b for b in part.blocks)
    return replace(net, components=(replace(part, blocks=blocks),))


def test_a_mixture_keeps_its_dense_part_and_a_cache():
    plan = _plan(mixture(), device_memory="800MiB")
    (phase,) = plan.phases
    assert plan.strategy == "experts"
    assert phase.expert_cache_bytes == 800 * MIB - DENSE
    assert {p.tier for p in phase.placements} == {Tier.DEVICE}
    assert {p.stored_bytes for p in phase.placements} == {64 * MIB}
    assert {p.experts_home for p in phase.placements} == {Tier.PINNED}
    assert plan.estimate.pinned_bytes == 4 * 64 * EXPERT
    assert plan.estimate.device_peak_bytes == 800 * MIB
    assert _rejected(plan)["stream"].viable
    assert Plan.from_json(plan.to_json()) == plan


def test_a_cache_is_whole_slots_and_no_more_than_all_experts():
    assert _plan(mixture(), device_memory="805MiB").phases[0].expert_cache_bytes == 800 * MIB - DENSE
    few = mixture(experts=4)
    plan = _plan(few, device_memory=f"{DENSE + 15 * EXPERT}B")
    assert (plan.strategy, plan.phases[0].expert_cache_bytes) == ("experts", 15 * EXPERT)


def test_a_token_waits_for_what_it_misses():
    plan = _plan(mixture(), device_memory="800MiB")
    token = _token(plan)
    hits = 0.67 + 0.14 * (61 / 256 - 0.125) / 0.125
    assert token.expert_hit_rate == pytest.approx(hits)
    assert token.expert_bytes == 4 * 2 * EXPERT
    assert token.missed_expert_bytes == pytest.approx(4 * 2 * EXPERT * (1 - hits), rel=1e-6)
    assert token.transfer_s == pytest.approx(token.missed_expert_bytes / LINK_BYTES_PER_S)
    # Experts are 16 of 80 MiB that a block reads. While one comes in the other one computes, where it is cached; the last computes alone.
    assert token.compute_s == pytest.approx(4 * 80 * MIB / MEMORY_BYTES_PER_S)
    missed, each_s, read_s = 1 - hits, EXPERT / LINK_BYTES_PER_S, EXPERT / MEMORY_BYTES_PER_S
    waited_s = 2 * missed * (1 - missed) * (each_s - read_s) + missed**2 * (2 * each_s - read_s)
    assert token.pass_s == pytest.approx(token.compute_s + 4 * waited_s)
    assert token.bound_by == "link"
    assert plan.estimate.token_s == pytest.approx(token.pass_s)
    assert plan.estimate.streamed_bytes in {one.missed_expert_bytes for one in plan.phases[0].passes}


def test_a_prompt_brings_in_most_of_what_is_not_cached():
    plan = _plan(mixture(), device_memory="800MiB", work=Workload(prompt_tokens=1024, new_tokens=33))
    prefill = plan.phases[0].passes[0]
    assert prefill.name == "prefill"
    assert prefill.expert_bytes == pytest.approx(4 * 64 * EXPERT, rel=1e-6)
    assert prefill.expert_hit_rate == pytest.approx((62 - 32) / 256, rel=1e-3)


def test_heat_makes_another_prediction_and_the_same_decision():
    hot = tuple([0.5] * 4 + [0.0] * 60)
    cold, warm = (_plan(_with(mixture(), heat=heat), device_memory="800MiB") for heat in ((), hot))
    assert _token(warm).expert_hit_rate == pytest.approx(1)
    assert warm.estimate.token_s < cold.estimate.token_s
    assert warm.fingerprint == cold.fingerprint
    assert "by what earlier runs asked for" in " ".join(warm.reasons)


def test_layers_that_are_asked_for_less_have_fewer_slots():
    """Slots are for all banks: one whose tokens go to two experts leaves the others to the other bank."""
    net = mixture(blocks=2)
    (part,) = net.components
    heats = ((1.0, 1.0) + (0.0,) * 62, (2 / 64,) * 64)
    blocks = tuple(replace(b, experts=replace(b.experts, heat=heat)) for b, heat in zip(part.blocks, heats, strict=True))
    banks = tuple(b.experts for b in blocks)
    one, other = asked_of(banks, 40, 1)
    assert one.missed < 0.05
    assert other.missed == pytest.approx(2 * (1 - 37 / 64), rel=0.15)


# ---- where experts wait


def test_experts_wait_on_disk_where_ram_is_short():
    plan = _plan(mixture(), on(device=2**40, host=GIB), device_memory="800MiB", host_memory="600MiB")
    homes = [p.experts_home for p in plan.phases[0].placements]
    assert Tier.DISK in homes
    assert plan.estimate.pinned_bytes + plan.estimate.ram_bytes <= 600 * MIB
    with pytest.raises(DoesNotFit):
        _plan(mixture(), on(device=2**40, host=GIB), device_memory="800MiB", host_memory="100MiB", allow_disk=False)


def test_where_ram_computes_experts_are_read_from_disk_into_a_cache_in_ram():
    plan = _plan(mixture(), on(device=None, host=16 * GIB), device_memory="800MiB")
    (phase,) = plan.phases
    assert (plan.strategy, plan.device) == ("experts", "cpu")
    assert {p.experts_home for p in phase.placements} == {Tier.DISK}
    assert plan.estimate.pinned_bytes == plan.estimate.ram_bytes == 0
    # A slot has room for the pages around a record.
    slots = (800 * MIB - DENSE) // (EXPERT + 8192)
    assert phase.expert_cache_bytes == slots * (EXPERT + 8192)
    token = _token(plan)
    assert token.bound_by == "disk"
    assert token.transfer_s == pytest.approx(token.missed_expert_bytes / DISK_BYTES_PER_S)
    # Two that are missed are read at the same time and compute behind each other.
    missed, each_s, read_s = 1 - token.expert_hit_rate, EXPERT / DISK_BYTES_PER_S, EXPERT / MEMORY_BYTES_PER_S
    waited_s = 2 * missed * (1 - missed) * (each_s - read_s) + missed**2 * 2 * each_s
    assert token.pass_s == pytest.approx(token.compute_s + 4 * waited_s)
    assert plan.estimate.total_s < _rejected(plan)["stream"].estimate.total_s / 5
    assert Plan.from_json(plan.to_json()) == plan


def test_computing_of_experts_hides_reads_that_are_shorter():
    fast = replace(RATES, disk_bytes_per_s=1e13)
    plan = _plan(mixture(), on(fast, device=None, host=16 * GIB), device_memory="800MiB", excluded=frozenset({("strategy", "stream")}))
    token = _token(plan)
    assert plan.strategy == "experts"
    # Where both of a token's experts are missed nothing computes meanwhile.
    waited_s = (1 - token.expert_hit_rate) ** 2 * 2 * EXPERT / 1e13
    assert token.pass_s == pytest.approx(token.compute_s + 4 * waited_s)
    assert token.bound_by == "memory"


def test_processor_and_link_share_what_is_missed():
    slow = on(device=2**40)
    cpu = Rates(0, 0, 0, memory_bytes_per_s=3e9, compute=(ComputeRate("matmul", "BF16", 1e12),))
    both = replace(slow, cpu_rates=cpu)
    assert (cpu_bytes_per_s(slow), cpu_bytes_per_s(both)) == (0.0, 0.65 * 3e9)
    tiny = mixture(per_token=16)
    one, other = (_plan(tiny, m, device_memory="800MiB") for m in (slow, both))
    assert (one.strategy, other.strategy) == ("experts", "experts")
    missed = _token(one).missed_expert_bytes
    assert _token(other).missed_expert_bytes == missed
    assert _token(other).transfer_s == pytest.approx(missed / (LINK_BYTES_PER_S + 0.65 * 3e9))
    # A single missed expert takes the faster of both.
    lone = _plan(mixture(), both, device_memory="800MiB")
    assert lone.estimate.token_s < _plan(mixture(), slow, device_memory="800MiB").estimate.token_s
    # A CPU that computes has no experts to take from itself.
    assert cpu_bytes_per_s(replace(on(device=None), cpu_rates=cpu)) == 0


def test_rates_of_fetches():
    assert fetch_bytes_per_s(Tier.PINNED, RATES, False) == LINK_BYTES_PER_S
    assert fetch_bytes_per_s(Tier.RAM, RATES, False) == 0.5e9
    assert fetch_bytes_per_s(Tier.DISK, replace(RATES, disk_bytes_per_s=5e9), False) == LINK_BYTES_PER_S
    assert fetch_bytes_per_s(Tier.DISK, replace(RATES, disk_bytes_per_s=5e9), True) == 5e9


# ---- no way


def test_with_too_little_for_the_dense_part_experts_are_no_way():
    plan = _plan(mixture(), device_memory="700MiB", excluded=frozenset({("strategy", "experts")}))
    assert plan.strategy == "stream"
    other = _rejected(_plan(mixture(dense_bytes=200 * MIB), device_memory="830MiB"))["experts"]
    assert not other.viable
    assert other.reason.startswith("model without its experts and with room for 2 of them needs 864.0 MiB of 830.0 MiB")


def test_two_experts_are_the_smallest_cache():
    plan = _plan(mixture(per_token=4), device_memory=f"{DENSE + 2 * EXPERT}B")
    assert (plan.strategy, plan.phases[0].expert_cache_bytes) == ("experts", 2 * EXPERT)
    assert _token(plan).expert_hit_rate == pytest.approx(0)
    with pytest.raises(DoesNotFit):
        _plan(mixture(), device_memory=f"{DENSE + 2 * EXPERT - 1}B")


def test_experts_that_cannot_be_kept_apart_are_streamed_with_their_blocks():
    net = _with(mixture(), separable=False)
    plan = _plan(net, device_memory="800MiB")
    assert plan.strategy == "stream"
    assert {p.experts_home for p in plan.placements()} == {None}
    other = _rejected(plan)["experts"]
    assert not other.viable
    assert other.reason == "model: Moe computes with all experts of a block at once, so that none can wait apart from it"


def test_blocks_without_separable_experts_stay_whole_beside_the_others():
    net = mixture()
    (part,) = net.components
    first = replace(part.blocks[0], experts=replace(part.blocks[0].experts, separable=False))
    net = replace(net, components=(replace(part, blocks=(first, *part.blocks[1:])),))
    plan = _plan(net, device_memory="1200MiB")
    assert plan.strategy == "experts"
    assert [p.experts_home for p in plan.placements()] == [None] + [Tier.PINNED] * 3
    assert [p.stored_bytes for p in plan.placements()] == [first.slab_bytes] + [64 * MIB] * 3


def test_what_has_no_experts_is_not_told_of_them():
    plan = _plan(network(Component("model", "Llama", (), 0, 0, (), "model")), device_memory="1GiB")
    assert "experts" not in _rejected(plan)


# ---- sizes and formats


def test_the_slab_without_experts_is_what_was_laid_out():
    net = _with(mixture(), dense_bytes=65 * MIB)
    plan = _plan(net, device_memory="800MiB")
    assert {p.stored_bytes for p in plan.placements()} == {65 * MIB}


def test_only_forecasts_convert_blocks_whose_experts_are_apart():
    everything = {"formats": (FP8,), "device_memory": "440MiB"}
    assert _plan(mixture(), **everything).strategy == "experts fp8"
    done = _plan(mixture(), abilities=ALL - {"devices", "formats of experts"}, **everything)
    assert done.strategy == "experts"
    other = _rejected(done)["experts fp8"]
    assert (other.viable, other.carried_out) == (True, False)


PARTS = replace(INT8, parts=(PartSize(8), PartSize(32, 0)), decoding_bytes=8)
MATRICES = (Linear(2048, 1024, "BF16"), Linear(1024, 1024, "BF16", 2))
"""Of an expert of 8 MiB: 4 and twice 2."""


def _known(net: Network, matrices: tuple[Linear, ...] = MATRICES) -> Network:
    """The network with the matrices of its experts known, as those of models of a known class are."""
    (part,) = net.components
    blocks = tuple(
        replace(b, linear_count=4, linears=(Linear(2, 2, "BF16"),), experts=replace(b.experts, matrices=matrices)) for b in part.blocks
    )
    return replace(net, components=(replace(part, blocks=blocks),))


def _told_format(form, abilities=frozenset({"experts", "formats"}), net=None, **limits):
    asked = {"device_memory": "440MiB", "quality": "minimal", **limits}
    return _plan(net or _known(mixture()), formats=(form,), abilities=abilities, **asked)


def test_experts_whose_matrices_are_known_are_converted_alone():
    plan = _told_format(PARTS)
    expert = 2048 * 1024 + 4 * 2048 + 2 * (1024 * 1024 + 4 * 1024)
    assert plan.strategy == "experts int8"
    assert plan.quality == "minimal"
    assert {(p.format, p.stored_bytes) for p in plan.placements()} == {("int8", 64 * MIB)}
    (phase,) = plan.phases
    assert phase.expert_cache_bytes % expert == 0
    assert _token(plan).expert_bytes == 4 * 2 * expert
    # Room for decoding the largest matrix is kept beside what the passes take.
    assert phase.activation_bytes == 16 * MIB + 8 * 2048 * 1024
    assert plan.estimate.device_peak_bytes <= 440 * MIB


def test_a_kernel_for_experts_saves_decoding_them():
    decoded = _told_format(replace(PARTS, decode_bytes_per_s=1e9))
    direct = _told_format(replace(PARTS, decode_bytes_per_s=1e9, kernel_dtypes=("BF16",)))
    assert direct.strategy == "experts int8"
    assert direct.estimate.total_s < _total_in_int8(decoded)
    # Half of the bytes in another dtype, for which there is no kernel.
    mixed = _known(mixture(), (MATRICES[0], Linear(1024, 1024, "F32")))
    assert (
        _total_in_int8(_told_format(replace(PARTS, decode_bytes_per_s=1e9, kernel_dtypes=("BF16",)), net=mixed)) > direct.estimate.total_s
    )


def _total_in_int8(plan):
    return plan.estimate.total_s if plan.strategy == "experts int8" else _rejected(plan)["experts int8"].estimate.total_s


def test_experts_that_no_format_makes_smaller_stay_as_they_are():
    net = _known(mixture(), (Linear(8, 8, "BF16"),))
    plan = _told_format(PARTS, net=net)
    assert {p.format for p in plan.placements()} == {""}


def test_converted_experts_that_all_fit_are_all_cached():
    plan = _told_format(PARTS, net=_known(mixture(blocks=4)), device_memory="1500MiB")
    expert = 2048 * 1024 + 4 * 2048 + 2 * (1024 * 1024 + 4 * 1024)
    assert plan.strategy == "experts int8"
    assert plan.phases[0].expert_cache_bytes == 4 * 64 * expert
    assert _token(plan).missed_expert_bytes == 0


def test_without_times_the_fewest_bytes_win():
    net = mixture()
    bare = replace(net, components=(replace(net.components[0], profiles=()),))
    plan = _plan(bare, device_memory="800MiB")
    assert plan.strategy == "experts"
    assert plan.estimate.total_s is None
    assert 0 < plan.estimate.streamed_bytes < 4 * 2 * EXPERT
    assert _rejected(plan)["stream"].reason.startswith("moves ")


def test_a_layer_that_only_guesses_tokens_asks_for_nothing():
    net = mixture(blocks=5)
    (part,) = net.components
    profiles = tuple(replace(p, blocks=(*p.blocks[:4], replace(p.blocks[4], works=(), calls=0))) for p in part.profiles)
    plan = _plan(replace(net, components=(replace(part, profiles=profiles),)), device_memory="900MiB")
    assert plan.strategy == "experts"
    assert _token(plan).expert_bytes == 4 * 2 * EXPERT


# ---- what is told


def test_a_plan_tells_hits_bytes_and_limit():
    plan = _plan(mixture(), device_memory="800MiB")
    told = " ".join(plan.reasons)
    assert "256 experts wait outside, 2.00 GiB; a cache of 496.0 MiB holds 62 of them (24 %); a token uses 64.0 MiB" in told
    assert "model token: 80 % of the experts that it asks for are in the cache" in told
    summary = " ".join(plan.summary().split())
    assert "bound by copies to the device" in summary
    assert "tokens a second" in summary
    told = " ".join(_plan(mixture(), on(device=None, host=16 * GIB), device_memory="800MiB").summary().split())
    assert "bound by reads from disk" in told
    assert "(a prompt of 1024 assumed)" in " ".join(_plan(mixture(), device_memory="800MiB", work=Workload()).summary().split())


def test_plans_from_before_are_read_and_odd_shares_are_not():
    plan = _plan(mixture(), device_memory="800MiB")
    document = json.loads(plan.to_json())
    for one in document["phases"][0]["passes"]:
        del one["expert_bytes"], one["missed_expert_bytes"], one["expert_hit_rate"]
    assert Plan.from_json(json.dumps(document)).phases[0].passes[0].expert_hit_rate is None
    for odd in (1.5, -1, True, "0.5", float("nan")):
        document["phases"][0]["passes"][0]["expert_hit_rate"] = odd
        with pytest.raises(BadPlan):
            Plan.from_json(json.dumps(document))


def test_a_bank_of_a_tied_block_waits_once():
    bank = Experts(64, EXPERT, 2)
    size = 64 * MIB + 64 * EXPERT
    row = tuple(Block(f"layers.{i}", size // 2, size, size, (("BF16", size),), experts=bank) for i in range(3))
    tied = Block("layers.3", 0, 0, 0, (), tied_to="layers.0", experts=bank)
    part = Component("model", "Moe", (*row, tied), 0, 0, (("BF16", 3 * size),), "model")
    plan = _plan(network(part), device_memory="1GiB")
    assert plan.strategy == "experts"
    assert plan.estimate.pinned_bytes == 3 * 64 * EXPERT
    assert plan.placements()[3].experts_home is None
