"""What another machine would buy."""

from __future__ import annotations

import pytest

from overflowml_core.facts import Limits, Workload
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan, what_if, with_outlook
from tests.planner.build import GIB, MIB, llm
from tests.planner.build_timed import RATES, language, on


def _asked(net, mach, **limits):
    return net, mach, Workload(), Limits(**limits), (), frozenset()


def test_a_larger_card_and_a_faster_link_are_told():
    asked = _asked(language(blocks=60), on(device=8 * GIB))
    plan = make_plan(*asked)
    assert (plan.strategy, plan.outlook) == ("stream", ())
    answers = {answer.change: answer for answer in what_if(*asked, plan)}
    assert list(answers) == ["a card with 12.00 GiB", "a card with 16.00 GiB", "a link twice as fast"]
    assert answers["a card with 16.00 GiB"].strategy == "direct"
    assert answers["a link twice as fast"].total_s < plan.estimate.total_s
    assert answers["a card with 12.00 GiB"].total_s < plan.estimate.total_s


def test_more_ram_is_told_where_weights_wait_on_disk():
    asked = _asked(language(blocks=60), on(device=4 * GIB, host=8 * GIB))
    plan = make_plan(*asked)
    assert plan.estimate.disk_bytes
    assert "16.00 GiB of RAM" in {answer.change for answer in what_if(*asked, plan)}


def test_what_buys_nothing_is_left_out():
    asked = _asked(language(), on(device=64 * GIB))
    assert what_if(*asked, make_plan(*asked)) == ()
    asked = _asked(llm(4, 10 * MIB, 0, 0), on(device=64 * GIB))
    assert what_if(*asked, make_plan(*asked)) == ()


@pytest.mark.parametrize("mach", [on(device=None, host=4 * GIB), on(device=4 * GIB, host=4 * GIB, unified=True)], ids=["cpu", "unified"])
def test_in_ram_more_of_it_is_a_larger_card(mach):
    asked = _asked(language(blocks=24), mach)
    plan = make_plan(*asked)
    assert plan.strategy == "stream"
    assert [(a.change, a.strategy) for a in what_if(*asked, plan)] == [("8.00 GiB of RAM", "direct")]


def test_the_outlook_is_part_of_the_plan_and_not_of_its_decision():
    asked = _asked(language(blocks=60), on(device=8 * GIB))
    plan = make_plan(*asked)
    told = with_outlook(plan, *asked)
    assert told.fingerprint == plan.fingerprint
    assert Plan.from_json(told.to_json()) == told
    assert "with another machine:" in told.summary()
    assert "a link twice as fast: stream" in told.summary()
    assert plan.rates == RATES
