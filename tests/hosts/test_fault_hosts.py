"""A sample of the points that ``benchmarks/faults.py --hosts`` fails one by one: what hosts load, run, adapt and release."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.hosts.fault_lives import HostSubject, flux_subject, llama_subject, on_virtual
from tests.runtime.conftest import Virtual, vgpu  # noqa: F401 -- a fixture
from tests.runtime.fault_points import sweep

pytestmark = pytest.mark.usefixtures("unprofiled")
ROOM_BYTES = 40_000


@pytest.fixture
def simulated(vgpu: Virtual, caplog: pytest.LogCaptureFixture) -> Iterator[Virtual]:  # noqa: F811 -- as fixtures are used
    caplog.set_level(logging.ERROR, "overflowml")
    with on_virtual(vgpu.device):
        yield vgpu


def test_a_model_that_decodes_is_right_or_says_what_failed(tmp_path: Path, simulated: Virtual) -> None:
    subject = llama_subject(tmp_path).within(ROOM_BYTES)
    for kind, stage, stride in (("copy", "load", 4), ("alloc", "first pass", 250), ("copy", "adapter", 40), ("copy", "remove", 1)):
        _check(simulated, subject, kind, stage, stride)


def test_a_pipeline_is_right_or_says_what_failed(tmp_path: Path, simulated: Virtual) -> None:
    _check(simulated, flux_subject(tmp_path).within(ROOM_BYTES, 0), "read", "adapter", 60)


def _check(virtual: Virtual, subject: HostSubject, kind: str, stage: str, stride: int) -> None:
    tally = sweep(virtual, subject, kind, stage, stride)
    assert tally.wrong == []
    assert tally.points == tally.right + tally.clear > 0
