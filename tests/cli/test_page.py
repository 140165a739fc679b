"""The page stands alone, escapes what it shows, and draws every block."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.cli.page import page_of
from overflowml_core.cli.page.charts import timeline_chart
from overflowml_core.cli.page.markup import element
from overflowml_core.facts import Tier
from overflowml_core.plan import Avoided, Rejected
from overflowml_core.planner.timeline import Event, Timeline

VOID = {"meta", "rect", "line", "path", "br"}


class Elements(HTMLParser):
    """All elements of a page, checked to be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID or (self.get_starttag_text().endswith(">") and tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_for(planned) -> str:
    return page_of(planned.plan, planned.timeline, planned.machine, "a model")


@pytest.fixture(scope="module", params=["diffusion", "experts", "several"])
def page(request) -> str:
    return page_for(request.getfixturevalue(request.param))


def test_every_element_is_closed(page):
    assert len(Elements(page).found) > 100


def test_nothing_comes_from_elsewhere(page):
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use")
        assert not {"src", "href", "action", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_policy_admits_our_script_alone(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_every_block_is_drawn_in_its_tier(diffusion):
    shapes = [a.get("class") for tag, a in Elements(page_for(diffusion)).found if tag == "rect"]
    placements = diffusion.plan.placements()
    for tier in (Tier.DEVICE, Tier.PINNED):
        assert shapes.count(f"t-{tier.value}") == sum(p.tier is tier for p in placements) > 0


def test_the_figures_of_the_plan_are_on_the_page(diffusion):
    text = " ".join(Elements(page_for(diffusion)).text)
    for words in ("It runs: ", "29.94 GiB", "of 30.22 GiB", "28 x denoise", "recommended", "datasheet", diffusion.plan.fingerprint):
        assert words in text


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' &amp; \x1b[2J \udc80"


def test_names_of_strangers_are_text(diffusion):
    plan, timeline = diffusion.plan, diffusion.timeline
    placements = tuple(replace(p, block=HOSTILE, component=HOSTILE, format=HOSTILE) for p in plan.phases[0].placements)
    phase = replace(plan.phases[0], name=HOSTILE, components=(HOSTILE,), placements=placements, variant=HOSTILE)
    plan = replace(
        plan,
        network=HOSTILE,
        device_name=HOSTILE,
        phases=(phase,),
        reasons=(HOSTILE,),
        rejected=(Rejected(HOSTILE, HOSTILE),),
        traps=(Avoided(HOSTILE, HOSTILE, HOSTILE),),
    )
    events = tuple(replace(event, block=HOSTILE, component=HOSTILE) for event in timeline.events)
    sections = tuple(replace(section, phase=HOSTILE, name=HOSTILE) for section in timeline.sections)
    page = page_of(plan, replace(timeline, events=events, sections=sections), diffusion.machine, HOSTILE)
    page.encode()
    found = Elements(page).found
    assert len([tag for tag, _ in found if tag == "script"]) == 1
    assert not [tag for tag, _ in found if tag == "img"]
    assert "\x1b" not in page


@given(st.text(), st.text())
def test_an_element_gives_back_its_text_and_attributes(text, value):
    parsed = Elements(element("p", text, title=value))
    (shown,) = {("".join(parsed.text), parsed.found[0][1]["title"])}
    expected = tuple("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in given) for given in (text, value))
    assert shown == expected


def test_more_events_than_anybody_looks_at_are_drawn_as_fewer_shapes(diffusion):
    step = 1e-6
    events = tuple(Event("compute", 0, "model", f"b{i}", i * step, (i + 1) * step) for i in range(10_000))
    long = replace(diffusion.timeline, events=events, drawn_s=10_000 * step)
    assert timeline_chart(long, diffusion.plan).count("<rect") == 1


def test_without_times_there_is_no_drawing(diffusion):
    empty = Timeline((), (), (), 0.0, None, 10, ("model",))
    assert "<svg" not in timeline_chart(empty, diffusion.plan)
    assert "Nobody knows the times of model" in page_of(diffusion.plan, empty, diffusion.machine, "")


def test_the_parts_of_a_bar_are_all_that_the_devices_hold(several):
    assert len(several.plan.devices) == 2
    widths = [
        float(w) for w in re.findall(r'class="(?:fixed|resident|slots|experts|activations)" style="width:([0-9.]+)%"', page_for(several))
    ]
    top = max(several.plan.budget.device_bytes, several.plan.phases[0].device_bytes)
    assert sum(widths) == pytest.approx(100 * several.plan.phases[0].device_bytes / top, abs=0.01)
