"""A sample of the points that ``benchmarks/faults.py`` fails one by one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.runtime.build import Stack, rows, save, slots_budget, stack
from tests.runtime.conftest import Virtual
from tests.runtime.fault_points import KINDS, STAGES, Subject, Tally, sweep


def call(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(rows().to("vgpu")).cpu()


def subject(tier: str, folder: Path) -> Subject:
    module = stack(4, 16, ends=True)
    path = save(module.state_dict(), folder / "model.safetensors") if tier == "disk" else None
    return Subject(module, path, call, slots_budget(module, 2, 1), tier)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_after_a_fault_the_result_is_right_or_the_error_clear(
    tier: str, kind: str, tmp_path: Path, vgpu: Virtual, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "overflowml")
    stages = [STAGES[(KINDS.index(kind) + i) % 4] for i in range(2)]
    tallies = [sweep(vgpu, subject(tier, tmp_path), kind, stage, tmp_path / "store", stride=5) for stage in stages]
    assert [problem for tally in tallies for problem in tally.wrong] == []
    assert all(tally.points == tally.right + tally.clear for tally in tallies)


class Writing(Stack):
    """Writes into its input, as no one should."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1.0))


def test_a_sweep_sees_a_wrong_result(tmp_path: Path, vgpu: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    from overflowml_core.runtime import elastic_state

    monkeypatch.setattr(elastic_state.CallState, "put_back", lambda self: "")  # calls again what was half done

    module = Writing(4, 16, ends=True).eval().requires_grad_(False)
    tally: Tally = sweep(vgpu, Subject(module, None, call, slots_budget(module, 2, 1), "pinned"), "alloc", "first pass", tmp_path, stride=4)
    assert any("another result" in problem for problem in tally.wrong)
