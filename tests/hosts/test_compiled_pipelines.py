"""Managed pipelines whose repeated blocks are compiled: as many graphs as without overflowml, and a trial keeps out of them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import overflowml
from tests.hosts import pipelines
from tests.hosts.check import assert_same, whole_blocks


@pytest.fixture(scope="module")
def compiled_alone() -> tuple[torch.Tensor, int]:
    """What a pipeline gives whose blocks are compiled and which nobody manages, and the graphs that it takes."""
    torch._dynamo.reset()
    counters.clear()
    pipe = pipelines.build("flux")
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    return pipelines.run("flux", pipe), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("first", ["managed", "compiled"])
def test_repeated_blocks_are_compiled_whole_and_once(
    first: str, compiled_alone: tuple[torch.Tensor, int], caplog: pytest.LogCaptureFixture
) -> None:
    expected, graphs = compiled_alone
    caplog.set_level("INFO", "overflowml")
    torch._dynamo.reset()
    counters.clear()
    pipe = pipelines.build("flux")
    if first == "managed":
        overflowml.manage(pipe, whole_blocks(pipe))
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    if first == "compiled":
        overflowml.manage(pipe, whole_blocks(pipe))
    for _ in range(2):
        assert_same(pipelines.run("flux", pipe), expected)
        assert counters["stats"]["unique_graphs"] == graphs > 0
    assert overflowml.attachment(pipe).plan.phase_of("transformer").streamed
    assert "the trial of plans ends: transformer or blocks of it are compiled" in caplog.text
    overflowml.release(pipe)
    assert_same(pipelines.run("flux", pipe), expected)
    assert all("compile" not in vars(block) for block in pipe.transformer.modules())
