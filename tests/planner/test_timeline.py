"""A plan drawn: what the engines do when, and what is taken of the device."""

from __future__ import annotations

from itertools import pairwise

import pytest

from overflowml_core.errors import PlanMismatch
from overflowml_core.facts import Limits, Workload
from overflowml_core.planner import make_plan, timeline_of
from overflowml_core.planner.timeline import SHOWN_PASSES
from tests.planner.build import GIB, MIB, llm, network
from tests.planner.build_timed import ALL, FP8, language, mixture, on, timed, vae

TEXT = [
    timed("encoder", [100 * MIB] * 2, [0.1] * 2, activations=10 * MIB),
    timed("model", [100 * MIB] * 6, [0.05] * 6, 20, activations=20 * MIB),
]
CASES = {
    "direct": (network(*TEXT), {}, ()),
    "phased": (network(*TEXT), {"device_memory": "650MiB", "excluded": frozenset({("strategy", "stream"), ("strategy", "direct")})}, ()),
    "stream": (network(*TEXT), {"device_memory": "400MiB"}, ()),
    "one phase": (language(), {"device_memory": "1200MiB"}, ()),
    "format": (language(), {"device_memory": "1200MiB"}, (FP8,)),
    "experts": (mixture(), {"device_memory": "800MiB"}, ()),
    "variant": (network(*TEXT, vae()), {"device_memory": "3GiB"}, ()),
}


@pytest.fixture(params=sorted(CASES))
def drawn(request):
    net, limits, formats = CASES[request.param]
    mach = on(device=2**40)
    plan = make_plan(net, mach, Workload(prompt_tokens=32), Limits(**limits), formats, ALL - {"devices"})
    return plan, timeline_of(plan, net, mach, formats)


def test_an_engine_does_one_thing_at_a_time(drawn):
    _, timeline = drawn
    for engine in ("compute", "link", "disk"):
        row = [e for e in timeline.events if e.engine == engine]
        assert all(one.end_s <= other.start_s + 1e-9 for one, other in pairwise(row)), engine
        assert all(0 <= e.start_s < e.end_s <= timeline.drawn_s + 1e-9 for e in row)


def test_every_streamed_block_computes_behind_its_copy(drawn):
    plan, timeline = drawn
    for phase in plan.phases:
        for place in phase.streamed:
            own = [e for e in timeline.events if (e.component, e.block) == (place.component, place.block)]
            computes, copies = ([e for e in own if e.engine == engine] for engine in ("compute", "link"))
            shown = sum(s.shown for s in timeline.sections if s.phase == phase.name)
            assert len(computes) == shown
            # The first of one phase alone are in their slots from the unit of work before.
            assert len(copies) >= shown - 1
            for copy in copies:
                assert not any(c.start_s < copy.end_s and copy.start_s < c.end_s for c in computes)


def test_memory_reaches_the_peak_that_the_plan_predicts_and_never_more(drawn):
    plan, timeline = drawn
    assert max(sample.device_bytes for sample in timeline.memory) == plan.estimate.device_peak_bytes
    assert timeline.budget_bytes >= plan.estimate.device_peak_bytes
    assert [s.time_s for s in timeline.memory] == sorted(s.time_s for s in timeline.memory)


def test_repeated_passes_are_a_number(drawn):
    plan, timeline = drawn
    counts = [(p.name, one.name, one.count) for p in plan.phases for one in p.passes]
    assert [(s.phase, s.name, s.shown + s.more) for s in timeline.sections] == counts
    assert all(s.shown <= SHOWN_PASSES for s in timeline.sections)
    assert timeline.total_s == plan.estimate.total_s
    repeated = sum(s.more * s.pass_s for s in timeline.sections)
    assert timeline.drawn_s + repeated == pytest.approx(timeline.total_s, rel=0.1)


def test_a_drawing_is_bounded_whatever_is_repeated():
    net = network(timed("model", [10 * MIB] * 50, [0.01] * 50, 10_000))
    plan = make_plan(net, on(device=2**40), Workload(), Limits(device_memory="200MiB"))
    assert len(timeline_of(plan, net, on(device=2**40)).events) < 3 * 2 * 50


def test_missed_experts_are_told_apart_from_computing():
    net, mach = mixture(), on(device=2**40)
    plan = make_plan(net, mach, Workload(prompt_tokens=32), Limits(device_memory="440MiB"), (), ALL - {"devices"})
    assert plan.kind == "experts"
    timeline = timeline_of(plan, net, mach)
    assert {e.engine for e in timeline.events} == {"compute", "link"}


def test_what_nobody_profiled_is_named_and_not_drawn():
    plan = make_plan(llm(), on(device=2**40), Workload(), Limits(device_memory="8GiB"))
    timeline = timeline_of(plan, llm(), on(device=2**40))
    assert (timeline.events, timeline.unknown, timeline.total_s) == ((), ("model",), None)


def test_another_network_is_refused():
    plan = make_plan(language(), on(device=2**40), Workload(), Limits())
    for other in (language(blocks=9), network(*TEXT)):
        with pytest.raises(PlanMismatch):
            timeline_of(plan, other, on(device=2**40))


def test_a_plan_that_was_read_back_draws_the_same():
    net, mach = language(), on(device=GIB)
    plan = make_plan(net, mach, Workload(), Limits(), (FP8,), ALL)
    again = type(plan).from_json(plan.to_json())
    assert timeline_of(again, net, mach, (FP8,)) == timeline_of(plan, net, mach, (FP8,))
    # Without the format itself its bytes are known, and so is its time where decoding costs none.
    assert timeline_of(plan, net, mach).drawn_s == pytest.approx(timeline_of(plan, net, mach, (FP8,)).drawn_s, rel=0.01)
