"""The plan in words."""

from __future__ import annotations

import pytest

from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import Placement
from overflowml_core.planner import make_plan
from overflowml_core.planner.explain import residency_strip
from tests.planner.build import GIB, MIB, flux, llm, machine


def _strip(marks: str) -> str:
    return residency_strip([Placement("m", str(i), Tier.DEVICE if mark == "R" else Tier.RAM, Tier.RAM, 1) for i, mark in enumerate(marks)])


def test_strip_has_one_mark_a_block_and_folds_many():
    assert _strip("RssR") == "■□□■"
    assert _strip("s" * 60) == "□" * 60
    assert _strip("RRssRs" * 20) == "■□▣" * 20 + "  2 blocks a mark"
    assert _strip("") == ""


@pytest.mark.parametrize("device", [8 * GIB, 16 * GIB, 24 * GIB, 80 * GIB])
@pytest.mark.parametrize("measured", [False, True])
def test_summary_tells_what_was_decided(device, measured):
    plan = make_plan(flux(), machine(device, measured=measured), Workload(), Limits())
    text = plan.summary()
    assert max(len(line) for line in text.splitlines()) <= 104
    assert text == plan.summary()
    for word in ("FluxPipeline: 31.45 GiB", "Test GPU (cuda:0)", plan.strategy, "predicted peak", "not chosen:", "reasons:"):
        assert word in text
    for reason in (*(r.reason for r in plan.rejected), *plan.reasons):
        assert reason in " ".join(text.split())
    assert ("■" in text) == bool(plan.estimate.streamed_bytes)
    if plan.estimate.streamed_bytes:
        assert f"rest on {'measured' if measured else 'assumed, not measured'} rates" in " ".join(text.split())


def test_summary_says_what_nobody_measured():
    assert "activations: nobody knows those of model" in make_plan(llm(activations=0), machine(), Workload(), Limits()).summary()


def test_summary_warns_of_a_full_disk():
    plan = make_plan(llm(), machine(8 * GIB, 4 * GIB, disk=100 * MIB), Workload(), Limits())
    assert "100.0 MiB are free" in " ".join(plan.summary().split())


def test_one_slot_is_told():
    plan = make_plan(llm(), machine(), Workload(), Limits(device_memory="3300MiB"))
    assert plan.phases[0].slot_count == 1
    assert "416.0 MiB of staging, for more leaves too little room" in plan.summary()
