"""Trying both ways in turn, and keeping the faster."""

from __future__ import annotations

import random

import pytest

from overflowml_core.runtime.experts.tryout import Tryout


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_faster_way_is_kept_for_a_while(faster: bool, first: bool) -> None:
    tryout, draw = Tryout(first), random.Random(1)
    chosen = []
    for _ in range(600):
        chosen.append(tryout.choice)
        tryout.saw((1.0 if tryout.choice is faster else 1.3) * draw.uniform(0.9, 1.2))
    assert chosen[0] is first
    assert set(chosen[:32]) == {True, False}
    assert set(chosen[32:544]) == {faster}
    assert set(chosen[544:576]) == {True, False}


def test_what_took_for_ever_is_no_pass() -> None:
    tryout = Tryout()
    for _ in range(100):
        tryout.saw(1000.0)
        tryout.saw(-1.0)
    assert tryout.choice is True


def test_without_a_difference_it_stays_as_it_began() -> None:
    for first in (True, False):
        tryout = Tryout(first)
        for _ in range(40):
            tryout.saw(1.0)
        assert tryout.choice is first
