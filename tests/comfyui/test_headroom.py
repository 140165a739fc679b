"""The budget on the host's dynamic engine, which runs on a GPU alone: stand-ins of what is used of it, as comfy-aimdo 0.6 documents it."""

from __future__ import annotations

import sys
import types

import pytest

from overflowml_comfyui import running_host
from overflowml_comfyui.lowering import headroom_bytes
from overflowml_core.facts import Limits, Workload
from overflowml_core.plan import Budget, Estimate, Plan

GIB = 2**30
_PLAN = Plan("direct", "Flux", "f", 1, "cuda", "a card", Workload(), Limits(), Budget(10 * GIB, 0, 0), (), Estimate())


class _Control(types.ModuleType):
    """comfy_aimdo.control: one number for the process."""

    def __init__(self, before=0):
        super().__init__("comfy_aimdo.control")
        self.now, self.history = before, [before]

    def get_simple_vram_headroom(self):
        return self.now

    def set_simple_vram_headroom(self, headroom):
        if not 0 <= headroom <= 1 << 60:
            raise ValueError("simple_vram_headroom must be between 0 and 2**60 bytes")
        self.now = headroom
        self.history.append(headroom)


def _module(name, **values):
    made = types.ModuleType(name)
    vars(made).update(values)
    return made


@pytest.fixture
def engine(monkeypatch):
    """The host with this control of its dynamic engine."""

    def install(control):
        management = _module("comfy.model_management", get_total_memory=lambda device: 24 * GIB)
        monkeypatch.setitem(sys.modules, "comfy", _module("comfy", model_management=management))
        monkeypatch.setitem(sys.modules, "comfy.model_management", management)
        monkeypatch.setitem(sys.modules, "comfy_aimdo", _module("comfy_aimdo", **({} if control is None else {"control": control})))
        monkeypatch.setitem(sys.modules, "comfy_aimdo.control", control)
        return control

    return install


def _guider(is_dynamic=True):
    patcher = types.SimpleNamespace(is_dynamic=lambda: is_dynamic, load_device="cuda:0")
    return types.SimpleNamespace(model_patcher=patcher)


def test_all_but_the_budget_is_kept_free_while_the_model_samples(engine):
    control = engine(_Control(GIB))
    seen = []
    sampled = running_host.with_headroom(_PLAN, True)(lambda guider, x, y=0: seen.append(control.now) or (x, y), _guider(), 1, y=2)

    assert sampled == (1, 2)
    assert "but the budget is kept free" in running_host.engine_sentence(_guider().model_patcher, True)
    assert seen == [14 * GIB]
    assert control.now == GIB


def test_it_is_taken_back_after_an_error(engine):
    control = engine(_Control(GIB))

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running_host.with_headroom(_PLAN, True)(fail, _guider())
    assert control.history == [GIB, 14 * GIB, GIB]


@pytest.mark.parametrize(("is_capped", "is_dynamic"), [(False, True), (True, False)])
def test_nothing_is_set_without_a_budget_or_for_the_other_engine(engine, is_capped, is_dynamic):
    control = engine(_Control())

    assert running_host.with_headroom(_PLAN, is_capped)(lambda guider: "picture", _guider(is_dynamic)) == "picture"
    assert control.history == [0]


def test_an_older_engine_samples_and_the_report_says_that_the_budget_is_not_enforced(engine):
    engine(_module("comfy_aimdo.control", init=lambda: None))

    assert running_host.with_headroom(_PLAN, True)(lambda guider: "picture", _guider()) == "picture"
    assert "--vram-headroom" in running_host.engine_sentence(_guider().model_patcher, True)
    assert "no budget was asked for" in running_host.engine_sentence(_guider().model_patcher, False)


def test_an_engine_whose_library_is_not_loaded_samples_with_a_warning(engine, caplog):
    control = engine(_Control())

    def unready():
        raise RuntimeError("comfy-aimdo is not initialized")

    control.get_simple_vram_headroom = unready

    assert running_host.with_headroom(_PLAN, True)(lambda guider: "picture", _guider()) == "picture"
    assert "not enforced" in caplog.text


def test_the_headroom_never_falls_below_what_was_asked_for_at_the_start():
    assert headroom_bytes(_PLAN, 24 * GIB, 20 * GIB, True) == 20 * GIB
    assert headroom_bytes(_PLAN, 8 * GIB, GIB, True) == GIB
    assert headroom_bytes(_PLAN, 24 * GIB, GIB, False) == GIB
