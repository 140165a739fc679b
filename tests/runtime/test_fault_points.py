"""A sample of the points that ``benchmarks/faults.py`` fails one by one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from overflowml_core.runtime import elastic_state
from tests.runtime.build import Stack
from tests.runtime.conftest import Virtual
from tests.runtime.fault_lives import STAGES, BareSubject
from tests.runtime.fault_points import INTERRUPT, KINDS, sweep


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_after_a_fault_the_result_is_right_or_the_error_clear(
    tier: str, kind: str, tmp_path: Path, vgpu: Virtual, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "overflowml")
    subject = BareSubject(vgpu.device, tmp_path, tier)
    stages = [STAGES[(KINDS.index(kind) + i) % len(STAGES)] for i in range(2)]
    tallies = [sweep(vgpu, subject, kind, stage, stride=5) for stage in stages]
    assert [problem for tally in tallies for problem in tally.wrong] == []
    assert all(tally.points == tally.right + tally.clear for tally in tallies)


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_an_interrupt_leaves_nothing_half_done(tier: str, tmp_path: Path, vgpu: Virtual, caplog: pytest.LogCaptureFixture) -> None:
    """In every stage of a life: the same call again is right, nothing stays allocated, no hook and no thread is left."""
    caplog.set_level(logging.ERROR, "overflowml")
    subject = BareSubject(vgpu.device, tmp_path, tier)
    for stage, stride in zip(STAGES, (1197, 41, 37, 97, 67), strict=True):
        tally = sweep(vgpu, subject, INTERRUPT, stage, stride)
        assert tally.wrong == []
        assert tally.points == tally.right + tally.clear > 4


class Writing(Stack):
    """Writes into its input, as no one should."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1.0))


def test_a_sweep_sees_a_wrong_result(tmp_path: Path, vgpu: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_state.CallState, "put_back", lambda self: "")  # calls again what was half done
    subject = BareSubject(vgpu.device, tmp_path, "pinned")
    for module in subject.modules.values():
        module.__class__ = Writing
    subject.expect()
    tally = sweep(vgpu, subject, "alloc", "first pass", stride=4)
    assert any("another result" in problem for problem in tally.wrong)
