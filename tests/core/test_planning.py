"""Planning goes on until nobody objects, and never pretends that it listened."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from overflowml_core import builtin, planning, registry, session
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Limits
from overflowml_core.formats import Format
from overflowml_core.hookspecs import hookimpl
from overflowml_core.plugins import Plugins
from overflowml_core.traps import Objection
from tests.planner.build import GIB, llm, machine

FP8 = Format("fp8", 8.0, "minimal", 0.03)
NETWORK, MACHINE = llm(layers=8), machine(4 * GIB)


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """The built-in plugin alone."""
    made = Plugins({"builtin": builtin}, load_entry_points=False)
    monkeypatch.setattr(registry, "_plugins", [made])
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    return made


def _plugin(**hooks):
    return SimpleNamespace(**{f"overflowml_{name}": hookimpl(function) for name, function in hooks.items()})


def _objection(*exclude):
    return Objection("a-trap", exclude, "it would crash", "it is left out", "a source")


def test_what_is_objected_to_is_left_out_and_named(plugins):
    assert session.make_plan(NETWORK, Limits(), machine=MACHINE).kind == "stream"
    plugins.register(_plugin(objections=lambda plan: [_objection(("strategy", "stream"))] if plan.kind == "stream" else None), "careful")
    plan = session.make_plan(NETWORK, Limits(), machine=MACHINE)
    assert plan.kind == "sequential"
    assert ("strategy", "stream") in plan.limits.excluded
    assert "a-trap" in [trap.trap for trap in plan.traps]


def test_a_plan_that_ignores_objections_is_an_error(plugins):
    plugins.register(_plugin(objections=lambda: [_objection(("colour", "green"))]), "stubborn")
    with pytest.raises(OverflowmlError, match=r"still objects \(a-trap\)"):
        session.make_plan(NETWORK, Limits(), machine=MACHINE)


def test_objections_without_end_are_an_error(plugins):
    seen = []
    plugins.register(_plugin(objections=lambda: [_objection(("colour", str(seen.append(1) or len(seen))))]), "endless")
    with pytest.raises(OverflowmlError, match="still objects"):
        session.make_plan(NETWORK, Limits(), machine=MACHINE)
    assert len(seen) == planning._MOST_ROUNDS


def test_formats_are_planned_with_in_a_forecast_and_named_in_a_plan(plugins):
    plugins.register(_plugin(formats=lambda: [FP8]), "formats")
    network = session.describe("8GB")
    room = machine(6 * GIB)
    forecast = session.make_plan(network, Limits(), machine=room, forecast=True)
    assert forecast.strategy == "direct fp8"
    plan = session.make_plan(network, Limits(), machine=room)
    assert plan.quality == "lossless"
    (named,) = [r for r in plan.rejected if r.strategy == "direct fp8"]
    assert named.viable
    assert not named.carried_out


def test_watchers_hear_of_the_plan_that_is_returned(plugins):
    heard = []
    plugins.register(_plugin(planned=lambda plan: heard.append(plan)), "watcher")
    plan = session.make_plan(NETWORK, Limits(), machine=MACHINE)
    assert heard == [plan]


@pytest.mark.parametrize(("source", "forecast"), [("40", True), (40, True), ("model.gguf", True), ("owner/name", False), (object(), False)])
def test_what_no_host_loads_is_a_forecast(source, forecast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert session.is_forecast(source) is forecast
