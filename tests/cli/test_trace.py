"""The trace is what the Trace Event Format asks for: named processes and threads, spans and counters in microseconds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from overflowml_core.cli.trace import trace_of
from overflowml_core.planner.timeline import Event


@pytest.fixture(scope="module", params=["diffusion", "experts", "several"])
def planned(request):
    return request.getfixturevalue(request.param)


def events_of(planned, timeline=None) -> list[dict]:
    return json.loads(trace_of(planned.plan, timeline or planned.timeline))["traceEvents"]


def test_every_event_has_the_fields_of_its_phase(planned):
    for event in events_of(planned):
        assert event["ph"] in ("M", "X", "C")
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["ts"], (int, float))
        assert event["ts"] >= 0
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def test_spans_are_the_timeline_in_microseconds(planned):
    spans = [event for event in events_of(planned) if event["ph"] == "X" and "component" in event["args"]]
    assert len(spans) == len(planned.timeline.events)
    for span, event in zip(spans, planned.timeline.events, strict=True):
        assert span["ts"] == pytest.approx(event.start_s * 1e6, abs=1e-3)
        assert span["ts"] + span["dur"] == pytest.approx(event.end_s * 1e6, abs=2e-3)


def test_every_thread_that_works_has_a_name(planned):
    events = events_of(planned)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"} <= named
    assert {event["pid"] for event in events} == {event["pid"] for event in events if event["name"] == "process_name"}


def test_spans_of_a_thread_do_not_cross(planned):
    rows: dict[tuple[int, int], list[dict]] = {}
    for event in events_of(planned):
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    for row in rows.values():
        row.sort(key=lambda event: event["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in itertools.pairwise(row))


def test_the_counter_is_the_memory(planned):
    counted = [event["args"]["bytes"] for event in events_of(planned) if event["ph"] == "C"]
    assert counted == [sample.device_bytes for sample in planned.timeline.memory]
    assert max(counted) <= planned.plan.budget.device_bytes


def test_a_device_and_an_engine_that_nobody_named(diffusion):
    odd = replace(diffusion.timeline, events=(Event("fabric", 7, "model", "", 0.0, 1.0),))
    events = events_of(diffusion, odd)
    assert {"device 7", "fabric"} <= {event["args"]["name"] for event in events if event["ph"] == "M"}
