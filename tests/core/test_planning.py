"""Planning goes on until nobody objects, and never pretends that it listened."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from overflowml_core import builtin, planning, registry, session
from overflowml_core.errors import DoesNotFit, OverflowmlError, Unsupported
from overflowml_core.facts import Block, Component, Limits, Linear, Network, network_fingerprint
from overflowml_core.formats import Format, PartSize
from overflowml_core.hookspecs import hookimpl
from overflowml_core.plugins import Plugins
from overflowml_core.traps import Objection
from tests.core.codecs import IdleCodec
from tests.planner.build import GIB, llm, machine

PARTS = (PartSize(8), PartSize(32, 0))
FP8 = Format("fp8", 8.0, "minimal", 0.03, parts=PARTS)
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


def _named(plan, strategy):
    (named,) = [r for r in plan.rejected if r.strategy == strategy]
    return named


def test_a_forecast_takes_formats_and_a_plan_only_names_them_unasked(plugins):
    plugins.register(_plugin(formats=lambda: [FP8], codec=lambda format: IdleCodec(format)), "formats")
    network, room = session.describe("8GB"), machine(6 * GIB)
    forecast = session.make_plan(network, Limits(), machine=room, forecast=True)
    assert (forecast.strategy, forecast.limits.quality) == ("direct fp8", "minimal")
    plan = session.make_plan(network, Limits(), machine=room)
    assert (plan.quality, plan.limits.quality) == ("lossless", "lossless")
    named = _named(plan, "direct fp8")
    assert (named.viable, named.carried_out) == (True, True)
    assert named.reason.startswith("changes the result more than quality='lossless' permits, quality='minimal' would; ")
    asked = session.make_plan(network, Limits(quality="minimal"), machine=room)
    assert (asked.strategy, asked.quality) == ("direct fp8", "minimal")
    assert session.codecs_of(asked, room)["fp8"].format == FP8


@pytest.mark.parametrize(("parts", "made"), [(PARTS, False), ((), True)], ids=["no codec", "no parts"])
def test_a_format_that_nobody_makes_is_left_out_of_a_plan_and_not_of_a_forecast(plugins, parts, made):
    form = replace(FP8, parts=parts)
    plugins.register(_plugin(formats=lambda: [form], codec=lambda format: IdleCodec(format) if made else None), "formats")
    network, room, limits = session.describe("8GB"), machine(6 * GIB), Limits(quality="minimal")
    assert session.make_plan(network, limits, machine=room, forecast=True).strategy == "direct fp8"
    plan = session.make_plan(network, limits, machine=room)
    assert (plan.formats, plan.quality) == ((), "lossless")
    assert ("fp8", "*") in plan.limits.excluded
    assert _named(plan, "direct fp8").reason.startswith("excluded: fp8 in ")


def test_a_format_that_this_machine_misses_something_for_says_so(plugins):
    form = replace(FP8, missing="fp8 needs a package (pip install it)")
    plugins.register(_plugin(formats=lambda: [form]), "formats")
    network, room, limits = session.describe("8GB"), machine(6 * GIB), Limits(quality="minimal")
    assert session.make_plan(network, limits, machine=room, forecast=True).strategy == "direct fp8"
    plan = session.make_plan(network, limits, machine=room)
    named = _named(plan, "direct fp8")
    assert (plan.formats, named.viable, named.carried_out) == ((), True, False)
    assert named.reason.startswith("fp8 needs a package (pip install it); ")


def test_a_plan_in_a_format_that_is_gone_is_refused_with_the_way_out(plugins):
    plugins.register(_plugin(formats=lambda: [FP8], codec=lambda format: IdleCodec(format)), "formats")
    plan = session.make_plan(session.describe("8GB"), Limits(quality="minimal"), machine=machine(6 * GIB))
    plugins.manager.unregister(name="formats")
    with pytest.raises(Unsupported, match="no plugin does so on this machine; install torchao"):
        session.codecs_of(plan, MACHINE)


def test_what_only_a_loss_would_fit_is_refused_with_how_to_permit_it(plugins):
    plugins.register(_plugin(formats=lambda: [FP8], codec=lambda format: IdleCodec(format)), "formats")
    block = Block("blocks.0", 2**20, 2**21, 2**21, (("BF16", 2**21),), linear_count=2**20, linears=(Linear(1024, 1024, "BF16"),))
    part = Component("model", "Model", (block,), 0, 0, (("BF16", 2**21),), "model")
    network = Network((part,), "test", "Model", network_fingerprint((part,)))
    budget = FP8.slab_bytes(1024, 1024)
    with pytest.raises(DoesNotFit, match="or permit direct fp8 with quality='minimal'") as caught:
        session.make_plan(network, Limits.exactly(device_memory=budget), machine=MACHINE)
    assert "quality='minimal'" in [miss.remedy for miss in caught.value.near_misses]
    plan = session.make_plan(network, Limits.exactly(device_memory=budget, quality="minimal"), machine=MACHINE)
    assert plan.estimate.device_peak_bytes == budget


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


def test_a_caller_who_converts_by_itself_brings_its_formats_and_needs_no_codec(plugins):
    network, room = session.describe("8GB"), machine(6 * GIB)
    asked = Limits(quality="minimal", excluded=frozenset({("", "*")}))
    with pytest.raises(DoesNotFit, match="excluded"):
        session.make_plan(network, asked, machine=room)

    assert session.make_plan(network, asked, machine=room, own_formats=(FP8,)).formats == ("fp8",)
    assert session.make_plan(network, Limits(), machine=room, own_formats=(FP8,)).formats == ()  # nobody permitted it


def test_a_format_is_demanded_where_weights_as_they_are_would_fit(plugins):
    network, room = session.describe("8GB"), machine(64 * GIB)
    assert session.make_plan(network, Limits(quality="minimal"), machine=room, own_formats=(FP8,)).strategy == "direct"

    asked = Limits(quality="minimal", excluded=frozenset({("", "*")}))
    plan = session.make_plan(network, asked, machine=room, own_formats=(FP8,))
    assert plan.strategy == "direct fp8"
    assert _named(plan, "direct").reason == "excluded: weights as they are stored"


def test_a_scale_for_a_whole_weight_is_one_element():
    assert PartSize(32, columns=0, rows=0).nbytes(3072, 3072) == 4
    assert PartSize(32, columns=0).nbytes(3072, 3072) == 4 * 3072
    assert PartSize(8, columns=16, rows=2).nbytes(5, 33) == 3 * 3


def test_what_nothing_fits_is_refused_by_what_the_smallest_permitted_format_needs(plugins):
    network, room = session.describe("8GB"), machine(6 * GIB)
    with pytest.raises(DoesNotFit) as lossless:
        session.make_plan(network, Limits(device_memory="10MB", quality="lossless"), machine=room, own_formats=(FP8,))
    with pytest.raises(DoesNotFit) as converted:
        session.make_plan(network, Limits(device_memory="10MB", quality="minimal"), machine=room, own_formats=(FP8,))

    assert converted.value.near_misses[0].needed_bytes < lossless.value.near_misses[0].needed_bytes
    assert session.make_plan(
        network, Limits.exactly(converted.value.near_misses[0].needed_bytes, quality="minimal"), machine=room, own_formats=(FP8,)
    )
