"""Draws a timeline: memory against the budget, the passes, and what each engine works on, over one axis of time. Decides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overflowml_core.cli.page.markup import Markup, element, joined
from overflowml_core.cli.words import seconds_words
from overflowml_core.plan import Plan
from overflowml_core.units import format_bytes

if TYPE_CHECKING:
    from overflowml_core.planner.timeline import Event, Section, Timeline

_WIDTH = 1000.0
"""Width of the drawing in its own units; the browser stretches it, so that zooming stretches time alone."""
_MOST_EVENTS = 6000
"""With more events than this those of an engine that touch are drawn as one: a browser holds so many shapes, and nobody looks at more."""
_ENGINE_WORDS = {"compute": "computing", "link": "copies to the device", "disk": "reads from disk"}
_TICKS = 8
_LAST_TICK = 0.94
"""No tick stands behind this part of the axis, where its time would be cut off."""


def timeline_chart(timeline: Timeline, plan: Plan) -> Markup:
    """All lanes over one axis of time."""
    if timeline.drawn_s <= 0:
        return element("p", "Nobody knows the times of this plan, so that there is nothing to draw.", class_="dim")
    lanes = [_memory(timeline), _sections(timeline), *_engines(timeline, plan), _axis(timeline)]
    buttons = joined(
        *(element("button", label, type="button", data_zoom=factor, aria_label=words) for label, factor, words in _ZOOMS),
    )
    return joined(
        element("div", buttons, class_="zoom"),
        element("div", element("div", *lanes, class_="canvas"), class_="scroll", tabindex=0),
    )


_ZOOMS = (("+", "2", "zoom in"), ("\u2212", "0.5", "zoom out"), ("1:1", "0", "whole timeline"))


def _x(time_s: float, timeline: Timeline) -> float:
    return _WIDTH * min(max(time_s / timeline.drawn_s, 0.0), 1.0)


def _share(time_s: float, timeline: Timeline) -> str:
    return f"{100 * min(max(time_s / timeline.drawn_s, 0.0), 1.0):.4f}%"


def _svg(*shapes: str, label: str) -> Markup:
    return element("svg", *shapes, viewBox=f"0 0 {_WIDTH:.0f} 100", preserveAspectRatio="none", role="img", aria_label=label)


def _lane(name: str, *children: str, kind: str) -> Markup:
    return element("div", element("span", name, class_="lane-name"), *children, class_=f"lane {kind}")


def _memory(timeline: Timeline) -> Markup:
    samples, budget = timeline.memory, timeline.budget_bytes
    peak = max((sample.device_bytes for sample in samples), default=0)
    top = max(peak, budget, 1) * 1.08
    points: list[str] = []
    last = 0.0
    for sample in samples:
        x, y = _x(sample.time_s, timeline), 100 * (1 - sample.device_bytes / top)
        points.append(f"{'L' if points else 'M'}{x:.3f},{last if points else y:.3f}L{x:.3f},{y:.3f}")
        last = y
    line = "".join(points) + f"L{_WIDTH:.0f},{last:.3f}" if points else ""
    line_y = 100 * (1 - budget / top)
    shapes = [
        element("path", d=f"{line}L{_WIDTH:.0f},100L{points[0][1:].split(',')[0]},100Z", class_="area") if points else "",
        element("path", d=line, class_="step") if points else "",
        element("line", x1=0, x2=_WIDTH, y1=line_y, y2=line_y, class_="budget"),
    ]
    held = f"memory of the device: peak {format_bytes(peak)} of a budget of {format_bytes(budget)}"
    budget_words = element("span", f"budget {format_bytes(budget)}", class_="mark", style=f"top:{line_y:.2f}%")
    return _lane(held, element("div", _svg(*shapes, label=held), budget_words, class_="plot"), kind="memory")


def _sections(timeline: Timeline) -> Markup:
    return _lane("passes", element("div", *(_section(s, timeline) for s in timeline.sections), class_="plot"), kind="sections")


def _section(section: Section, timeline: Timeline) -> Markup:
    count = section.shown + section.more
    more = f", {section.shown} of {count} drawn" if section.more else ""
    told = f"{section.phase} {section.name}: {seconds_words(section.pass_s)} a pass{more}"
    place = f"left:{_share(section.start_s, timeline)};width:{_share(section.end_s - section.start_s, timeline)}"
    return element("div", element("span", told), class_="section", style=place, title=told)


def _engines(timeline: Timeline, plan: Plan) -> list[Markup]:
    names = plan.devices or (plan.device,)
    order = {"compute": 0, "link": 1, "disk": 2}
    lanes: dict[tuple[int, str], list[Event]] = {}
    for event in timeline.events:
        lanes.setdefault((event.device, event.engine), []).append(event)
    drawn = []
    for device, engine in sorted(lanes, key=lambda lane: (lane[0], order.get(lane[1], 9), lane[1])):
        events = lanes[device, engine]
        busy = sum(event.end_s - event.start_s for event in events) / timeline.drawn_s
        where = f"{names[device] if device < len(names) else device}: " if len(names) > 1 else ""
        told = f"{where}{_ENGINE_WORDS.get(engine, engine)}, busy {100 * busy:.0f} % of the time drawn"
        shapes = _merged(events, timeline) if len(timeline.events) > _MOST_EVENTS else [_shape(event, timeline) for event in events]
        drawn.append(_lane(told, element("div", _svg(*shapes, label=told), class_="plot"), kind=f"engine {engine}"))
    return drawn


def _shape(event: Event, timeline: Timeline) -> Markup:
    what = f"{event.component} {event.block}".strip()
    told = f"{what}: {seconds_words(event.end_s - event.start_s)}, from {seconds_words(event.start_s)}"
    left, right = _x(event.start_s, timeline), _x(event.end_s, timeline)
    return element("rect", element("title", told), x=left, y=0, width=max(right - left, 0.02), height=100)


def _merged(events: Sequence[Event], timeline: Timeline) -> list[Markup]:
    least = timeline.drawn_s / (4 * _WIDTH)
    spans: list[list[float]] = []
    for event in events:
        if spans and event.start_s - spans[-1][1] < least:
            spans[-1][1] = max(spans[-1][1], event.end_s)
        else:
            spans.append([event.start_s, event.end_s])
    pairs = [(_x(start, timeline), _x(end, timeline)) for start, end in spans]
    return [element("rect", x=left, y=0, width=max(right - left, 0.02), height=100) for left, right in pairs]


def _axis(timeline: Timeline) -> Markup:
    step = _nice(timeline.drawn_s / _TICKS)
    count = int(_LAST_TICK * timeline.drawn_s / step + 1e-9)
    ticks = [
        element("span", seconds_words(i * step) if i else "0", class_="tick", style=f"left:{_share(i * step, timeline)}")
        for i in range(count + 1)
    ]
    return element("div", *ticks, class_="axis")


def _nice(seconds: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no shorter."""
    power: float = 10.0 ** math.floor(math.log10(seconds))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= seconds * (1 - 1e-9))
