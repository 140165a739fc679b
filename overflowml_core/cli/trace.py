"""Writes a timeline as a trace for ui.perfetto.dev: the JSON of Chrome's trace events ("Trace Event Format"), times in microseconds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from overflowml_core.plan import Plan

if TYPE_CHECKING:
    from overflowml_core.planner.timeline import Timeline

_ENGINES = {"compute": "computing", "link": "copies to the device", "disk": "reads from disk"}
_PASSES_TID, _MEMORY = 1, "memory of the compute tier"


def trace_of(plan: Plan, timeline: Timeline) -> str:
    """The trace as a JSON text.

    One process for each accelerator, with a thread for each engine; the passes are a thread of the first, and memory is a counter there.
    Each section says how many passes follow that are not drawn.
    """
    names = plan.devices or (plan.device,)
    engines = [*_ENGINES, *sorted({e.engine for e in timeline.events} - set(_ENGINES))]
    tids = {engine: tid for tid, engine in enumerate(engines, _PASSES_TID + 1)}
    used = sorted({(e.device, e.engine) for e in timeline.events})
    events: list[dict[str, Any]] = []
    for device in sorted({0, *(device for device, _ in used)}):
        name = names[device] if device < len(names) else f"device {device}"
        events.append(_named("process_name", device, 0, f"{name} {plan.device_name}" if device == 0 else name))
    events.append(_named("thread_name", 0, _PASSES_TID, "passes"))
    events += [_named("thread_name", device, tids[engine], _ENGINES.get(engine, engine)) for device, engine in used]
    for section in timeline.sections:
        counts: dict[str, Any] = {"drawn": section.shown, "more": section.more, "pass_s": section.pass_s}
        events.append(_span(f"{section.phase} {section.name}", section.phase, 0, _PASSES_TID, (section.start_s, section.end_s), counts))
    for event in timeline.events:
        detail = {"component": event.component}
        name = event.block or event.component
        events.append(_span(name, event.engine, event.device, tids[event.engine], (event.start_s, event.end_s), detail))
    events += [
        {"ph": "C", "name": _MEMORY, "pid": 0, "tid": 0, "ts": _microseconds(sample.time_s), "args": {"bytes": sample.device_bytes}}
        for sample in timeline.memory
    ]
    about = {
        "plan": plan.fingerprint,
        "strategy": plan.strategy,
        "network": plan.network,
        "budget_bytes": timeline.budget_bytes,
        "total_s": timeline.total_s,
        "not_drawn": list(timeline.unknown),
    }
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}, separators=(",", ":"), allow_nan=False)


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _span(name: str, category: str, pid: int, tid: int, times: tuple[float, float], detail: dict[str, Any]) -> dict[str, Any]:
    start, end = (_microseconds(time_s) for time_s in times)
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": start, "dur": max(0.0, end - start), "args": detail}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
