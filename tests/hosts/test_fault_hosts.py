"""A sample of the points that ``benchmarks/faults.py --hosts`` fails one by one: what hosts load, run, adapt and release."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.hosts.fault_lives import HostSubject, flux_subject, llama_subject, on_virtual
from tests.runtime.conftest import Virtual, vgpu  # noqa: F401 -- a fixture
from tests.runtime.fault_points import sweep

pytestmark = pytest.mark.usefixtures("unprofiled")
ROOM_BYTES = 40_000


@pytest.mark.parametrize(
    ("kind", "stage", "stride"), [("copy", "load", 4), ("alloc", "first pass", 199), ("read", "later pass", 9), ("copy", "remove", 1)]
)
def test_a_model_that_decodes_is_right_or_says_what_failed(
    kind: str,
    stage: str,
    stride: int,
    tmp_path: Path,
    vgpu: Virtual,  # noqa: F811 -- as fixtures are used
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "overflowml")
    with on_virtual(vgpu.device):
        subject = llama_subject(tmp_path).within(ROOM_BYTES, 0 if kind == "read" else None)
        _check(vgpu, subject, kind, stage, stride)


@pytest.mark.parametrize(("kind", "stage", "stride"), [("alloc", "later pass", 600), ("copy", "adapter", 100)])
def test_a_pipeline_is_right_or_says_what_failed(
    kind: str,
    stage: str,
    stride: int,
    tmp_path: Path,
    vgpu: Virtual,  # noqa: F811 -- as fixtures are used
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "overflowml")
    with on_virtual(vgpu.device):
        _check(vgpu, flux_subject(tmp_path).within(ROOM_BYTES), kind, stage, stride)


def _check(vgpu: Virtual, subject: HostSubject, kind: str, stage: str, stride: int) -> None:  # noqa: F811
    tally = sweep(vgpu, subject, kind, stage, stride)
    assert tally.wrong == []
    assert tally.points == tally.right + tally.clear > 0
