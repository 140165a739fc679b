"""Two answers that the project is asked for, held to what they rest on: sizes alone, on an RTX 5090 (datasheet rates, PCIe 5)."""

from __future__ import annotations

import pytest

from overflowml_core.bare import bare_network, moe_network
from overflowml_core.facts import Accelerator, ComputeRate, HostMemory, Limits, Machine, Rates, Tier, Workload
from overflowml_core.formats import Format
from overflowml_core.planner import make_plan
from tests.planner.build_timed import ONE_DEVICE

GB, GIB = 10**9, 2**30
RATES = Rates(
    55 * GB, 55 * GB, 7 * GB, "datasheet", memory_bytes_per_s=1792 * GB, compute=(ComputeRate("matmul", "BF16", 209.5e12),), launch_s=5e-6
)
FORMATS = (Format("fp8", 8.06, "minimal", 0.027), Format("int8", 8.06, "minimal", 0.008), Format("int4", 4.25, "any", 0.1))
TOKENS = Workload(prompt_tokens=512, new_tokens=128)


def rtx_5090(ram: int) -> Machine:
    card = Accelerator("cuda", "RTX 5090", 0, 32 * GIB, 32 * GIB, rates=RATES, features=frozenset({"bf16", "fp8"}))
    return Machine((card,), HostMemory(ram, ram, ram * 9 // 10, 16), RATES, 2**42, named=True)


def test_forty_gigabytes_of_language_model_run_in_fp8_on_the_card():
    """FP8 of 40 GB in bfloat16 is 20 GB of 32; a token reads that from a memory of 1792 GB/s; streaming waits for 9 GB over the link."""
    plan = make_plan(bare_network(40 * GB, TOKENS), rtx_5090(194 * GB), TOKENS, Limits(), FORMATS, ONE_DEVICE)
    assert (plan.strategy, plan.quality) == ("direct fp8", "minimal")
    assert 20 * GB < plan.estimate.device_peak_bytes < 23 * GB
    rejected = {r.strategy: r for r in plan.rejected}
    assert rejected["direct"].reason.startswith("needs 37.4")
    stream = rejected["stream"].estimate
    assert stream.token_s == pytest.approx(stream.streamed_bytes / (55 * GB), rel=0.2)
    assert stream.token_s > 5 * plan.estimate.token_s
    assert plan.phases[0].passes[1].bound_by == "memory"


def test_forty_gigabytes_of_image_model_are_streamed_without_loss_in_the_same_time():
    """At 1024 x 1024 pixels a pass computes longer than what does not fit takes to copy: FP8 would save nothing, and cost precision."""
    work = Workload(steps=28)
    plan = make_plan(bare_network(40 * GB, work), rtx_5090(194 * GB), work, Limits(), FORMATS, ONE_DEVICE)
    assert (plan.strategy, plan.quality) == ("stream", "lossless")
    (denoise,) = plan.phases[0].passes
    assert denoise.transfer_s < denoise.compute_s
    assert plan.estimate.bound_by == "compute"
    fp8 = next(r for r in plan.rejected if r.strategy == "direct fp8")
    assert fp8.viable
    assert plan.estimate.total_s <= 1.03 * fp8.estimate.total_s


def test_a_mixture_of_120_billion_offloads_its_experts_as_stored():
    """4.8 billion shared weights stay; 115 billion in experts wait in RAM; a token uses 7.2 of them; a cache of a quarter finds 80 %."""
    net = moe_network(120, 12, 128, 8, 120 * GB, TOKENS)
    plan = make_plan(net, rtx_5090(196 * GB), TOKENS, Limits(), FORMATS, ONE_DEVICE)
    (phase,) = plan.phases
    assert (plan.strategy, plan.quality) == ("experts", "lossless")
    assert {p.experts_home for p in phase.placements} == {Tier.PINNED}
    assert plan.estimate.device_peak_bytes <= plan.budget.device_bytes
    active_bytes = sum(b.experts.per_token * b.experts.nbytes for b in net.components[0].blocks)
    token = phase.passes[1]
    assert token.transfer_s == pytest.approx(0.2 * active_bytes / (55 * GB), rel=0.1)
    assert token.transfer_s < token.pass_s < token.compute_s + token.transfer_s  # experts that are there compute while others come in
    stream = next(r for r in plan.rejected if r.strategy == "stream")
    assert stream.viable
    assert stream.estimate.total_s > 20 * plan.estimate.total_s
