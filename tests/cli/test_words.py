"""Words follow from the numbers that they stand beside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core import session
from overflowml_core.cli.alternatives import alternatives, carried_out, refused
from overflowml_core.cli.words import hardware_words, seconds_words, speed_words, strategy_words, vram_words
from overflowml_core.plan import Estimate

ORDER = ("fastest", "fast", "medium", "slow", "slowest")
times = st.lists(st.one_of(st.none(), st.floats(1e-3, 1e9)), max_size=12)


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (1, "fastest"),
        (1.03, "fastest"),
        (1.04, "fast"),
        (1.5, "fast"),
        (1.6, "medium"),
        (4, "medium"),
        (4.1, "slow"),
        (16, "slow"),
        (17, "slowest"),
    ],
)
def test_a_word_is_a_ratio_to_the_shortest_time(ratio, word):
    assert speed_words([2.0, 2.0 * ratio]) == ["fastest", word]


@given(times)
def test_the_shortest_is_the_fastest_and_longer_is_never_a_faster_word(seconds):
    words = speed_words(seconds)
    known = sorted((s, ORDER.index(w)) for s, w in zip(seconds, words, strict=True) if s is not None)
    assert [word for _, word in known] == sorted(word for _, word in known)
    assert not known or known[0][1] == 0
    assert [w == "unknown" for w in words] == [s is None for s in seconds]


def test_no_time_and_no_times():
    assert speed_words([]) == []
    assert speed_words([0.0, 0.0, 1.0]) == ["fastest", "fastest", "slowest"]


def test_a_cpu_takes_no_vram():
    assert vram_words("cpu", Estimate(device_peak_bytes=5)) == "none"
    assert vram_words("stream", Estimate(device_peak_bytes=2**30)) == "1.00 GiB"
    assert vram_words("stream", None) == "?"


def test_strategies_are_told_in_words_and_unknown_ones_are_not():
    assert strategy_words("stream fp8").endswith("weights in fp8")
    assert strategy_words("a plugin's own") == ""


@pytest.mark.parametrize(("seconds", "told"), [(None, "?"), (0.5, "500 ms"), (3599, "59 min 59 s"), (9183, "2 h 33 min")])
def test_times(seconds, told):
    assert seconds_words(seconds) == told


def test_equal_accelerators_are_counted(diffusion):
    from dataclasses import replace

    card = diffusion.machine.accelerators[0]
    assert hardware_words(replace(diffusion.machine, accelerators=(card, card))).startswith("2 x NVIDIA GeForce RTX 5090 (32.00 GiB), ")


def test_every_way_stands_in_one_of_the_two_lists(diffusion):
    plan = diffusion.plan
    named = [way.strategy for way in alternatives(plan)] + [row.strategy for row in refused(plan)]
    assert sorted(named) == sorted([plan.strategy, *(r.strategy for r in plan.rejected)])


def test_alternatives_are_in_order_of_time_and_exactly_one_is_chosen(diffusion, experts):
    for planned in (diffusion, experts):
        ways = alternatives(planned.plan)
        seconds = [way.estimate.total_s for way in ways]
        assert seconds == sorted(seconds)
        assert [way.strategy for way in ways if way.chosen] == [planned.plan.strategy]
        assert next(way.mark for way in ways if way.chosen).startswith("<- recommended")


@pytest.mark.parametrize(
    ("strategy", "needs"),
    [
        ("stream", ""),
        ("direct fp8", "formats"),
        ("experts", "experts"),
        ("experts int8", "experts, formats"),
        ("experts int4", "experts, formats, formats of experts"),
        ("devices", "devices"),
        ("cpu", "devices"),
        ("phased slicing+tiling", "variants"),
        ("stream fp8 tiling", "formats, variants"),
    ],
)
def test_what_this_version_does_not_do_is_a_forecast(monkeypatch, strategy, needs):
    abilities = set(filter(None, needs.split(", ")))
    monkeypatch.setattr(session, "abilities_of", lambda forecast: frozenset(abilities))
    assert carried_out(strategy)
    for ability in sorted(abilities):
        monkeypatch.setattr(session, "abilities_of", lambda forecast, left=abilities - {ability}: frozenset(left))
        assert not carried_out(strategy)
