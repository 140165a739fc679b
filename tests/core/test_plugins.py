"""Hooks are called as their page says, and a broken plugin is named and harms nobody else."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from overflowml_core import builtin, plugins
from overflowml_core.errors import BadPlan, OverflowmlError, PluginFault
from overflowml_core.facts import Accelerator, Component, HostMemory, Limits, Machine, Network, Rates, Workload
from overflowml_core.formats import Format
from overflowml_core.hookspecs import hookimpl
from overflowml_core.plan import Budget, Estimate, PhasePlan, Plan
from overflowml_core.traps import Objection
from tests.core.codecs import IdleCodec

NETWORK = Network((), "nowhere", "Nothing", "0")
MACHINE = Machine((), HostMemory(2**34, 2**33, 2**32, 2), Rates(1e9, 1e9, 1e9), 2**40)
PLAN = Plan("direct", "nowhere", "0", 0, "cpu", "CPU", Workload(), Limits(), Budget(2**30, 0, 0), (), Estimate())
INT8 = Format("int8", 8.0, "minimal", 0.01)
GPU = Accelerator("test", "a test", 0, 2**30, 2**30)


def plugin(**hooks):
    """A plugin with these functions as its hooks."""
    return SimpleNamespace(**{f"overflowml_{name}": hookimpl(function) for name, function in hooks.items()})


@pytest.fixture
def manager():
    return plugins.Plugins({}, load_entry_points=False)


def test_hook_accelerators(manager):
    manager.register(plugin(accelerators=lambda: None), "silent")
    manager.register(plugin(accelerators=lambda: [GPU]), "first")
    manager.register(plugin(accelerators=lambda: (GPU, GPU)), "second")
    assert manager.accelerators() == [GPU] * 3


def test_hook_describe(manager):
    seen = []
    manager.register(plugin(describe=lambda source: NETWORK), "answers")
    manager.register(plugin(describe=lambda source, options: seen.append((source, options))), "passes")
    assert manager.describe("here", Workload(), {"dtype": 1}) is NETWORK
    assert seen == [("here", {"dtype": 1})]


def test_hook_measure(manager):
    profiled = replace(NETWORK, source="profiled")
    manager.register(plugin(measure=lambda network: profiled), "answers")
    manager.register(plugin(measure=lambda source: None), "passes")
    assert manager.measure("here", NETWORK, Workload(), {}) is profiled


def test_a_profile_may_not_change_the_network(manager):
    other = Component("model", "Model", (), 0, 0, (), "model", fingerprint="other")
    manager.register(plugin(measure=lambda network: replace(network, components=(other,))), "liar")
    with pytest.raises(PluginFault, match="liar, overflowml_measure: changed the network"):
        manager.measure("here", NETWORK, Workload(), {})


def test_hook_formats(manager):
    manager.register(plugin(formats=lambda machine: [INT8]), "one")
    manager.register(plugin(formats=lambda: None), "silent")
    assert manager.formats(MACHINE) == (INT8,)


def test_hook_codec(manager):
    assert manager.codec(INT8, MACHINE) is None
    manager.register(plugin(codec=lambda format, machine: IdleCodec(format) if machine is MACHINE else None), "one")
    manager.register(plugin(codec=lambda: None), "silent")
    assert manager.codec(INT8, MACHINE).format is INT8


def test_a_codec_that_cannot_convert_is_an_error(manager):
    manager.register(plugin(codec=lambda: INT8), "wrong")
    with pytest.raises(PluginFault, match="plugin wrong, overflowml_codec: returned a Format, expected Codec or None"):
        manager.codec(INT8, MACHINE)


def test_a_format_that_two_plugins_name_is_an_error_that_names_both(manager):
    manager.register(plugin(formats=lambda: [INT8]), "one")
    manager.register(plugin(formats=lambda: [INT8]), "other")
    with pytest.raises(PluginFault, match=r"plugin one, overflowml_formats: names 'int8', which plugin other names too"):
        manager.formats(MACHINE)


def test_hook_objections(manager):
    objection = Objection("trap", (("fp8", "*"),), "it crashes", "left out", "a source")
    manager.register(plugin(objections=lambda plan: [objection]), "one")
    manager.register(plugin(objections=lambda: None), "silent")
    assert manager.objections(PLAN, NETWORK, MACHINE) == [objection]


def test_hook_register_commands(manager, caplog):
    seen = []
    manager.register(plugin(register_commands=lambda app: seen.append(app)), "good")
    manager.register(plugin(register_commands=_raise), "bad")
    manager.register_commands("app")
    assert seen == ["app"]
    assert "plugin bad, overflowml_register_commands failed" in caplog.text


def test_hook_plan(manager):
    seen = []
    manager.register(plugin(plan=lambda limits, formats, abilities: seen.append((formats, abilities)) or PLAN), "planner")
    assert manager.plan(NETWORK, MACHINE, Workload(), Limits(), (INT8,), frozenset({"formats"})) is PLAN
    assert seen == [((INT8,), frozenset({"formats"}))]


def test_a_plugins_plan_is_checked(manager):
    fat = PhasePlan("p", ("c",), 2**40, "device", 0, 0, 0, (), Estimate())
    over = Plan("stream", "n", "0", 0, "cpu", "CPU", Workload(), Limits(), Budget(2**30, 0, 0), (fat,), Estimate(device_peak_bytes=2**40))
    manager.register(plugin(plan=lambda: over), "greedy")
    with pytest.raises(BadPlan, match="over its own budget"):
        manager.plan(NETWORK, MACHINE, Workload(), Limits())


def test_hook_components(manager):
    manager.register(plugin(components=lambda target: {"model": target}), "one")
    assert manager.components(5) == {"model": 5}


def test_hook_attached(manager):
    seen = []
    manager.register(plugin(attached=lambda target: seen.append(target)), "one")
    manager.register(plugin(attached=lambda attachment: seen.append(attachment)), "two")
    manager.attached("target", "attachment")
    assert sorted(seen) == ["attachment", "target"]


def test_hook_install_host(manager):
    seen = []
    manager.register(plugin(install_host=lambda: seen.append(1)), "one")
    manager.install_hosts()
    assert seen == [1]


def test_hook_uninstall_host(manager):
    seen = []
    manager.register(plugin(uninstall_host=lambda: seen.append(1)), "one")
    manager.uninstall_hosts()
    assert seen == [1]


def _raise():
    raise RuntimeError("broken")


def test_hook_planned(manager, caplog):
    seen = []
    manager.register(plugin(planned=lambda plan: seen.append(plan)), "good")
    manager.register(plugin(planned=_raise), "bad")
    with caplog.at_level(logging.ERROR):
        manager.planned(PLAN)
    assert seen == [PLAN]
    assert "plugin bad, overflowml_planned failed" in caplog.text


def test_hook_progress(manager, caplog):
    seen = []
    manager.register(plugin(progress=lambda done_bytes, total_bytes: seen.append((done_bytes, total_bytes))), "good")
    manager.register(plugin(progress=_raise), "bad")
    manager.progress(None, 1, 2)
    assert seen == [(1, 2)]
    assert "plugin bad" in caplog.text


def test_hook_ran(manager, caplog):
    seen = []
    manager.register(plugin(ran=lambda report: seen.append(report)), "good")
    manager.register(plugin(ran=_raise), "bad")
    manager.ran(PLAN, Estimate())
    assert seen == [Estimate()]
    assert "plugin bad" in caplog.text


def test_a_fault_names_plugin_and_hook(manager):
    manager.register(plugin(describe=lambda: _raise()), "broken-plugin")
    with pytest.raises(PluginFault, match=r"broken-plugin, overflowml_describe: RuntimeError: broken") as caught:
        manager.describe("x", Workload(), {})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_projects_own_errors_come_through(manager):
    def refuse():
        raise OverflowmlError("no")

    manager.register(plugin(describe=refuse), "refuses")
    with pytest.raises(OverflowmlError, match=r"^no$"):
        manager.describe("x", Workload(), {})


def test_a_wrong_answer_names_the_plugin(manager):
    manager.register(plugin(describe=lambda: 7), "seven")
    with pytest.raises(PluginFault, match=r"seven.*returned a int, expected Network"):
        manager.describe("x", Workload(), {})


@pytest.mark.parametrize("broken", [plugin(no_such_hook=lambda: None), plugin(describe=lambda no_such_argument: None)])
def test_a_plugin_that_does_not_fit_is_refused_whole(manager, broken):
    with pytest.raises(PluginFault, match="misfit"):
        manager.register(broken, "misfit")
    assert "misfit" not in manager.names()


def test_a_wrapper_is_refused(manager):
    def wrapper():
        yield

    with pytest.raises(PluginFault, match="wrapper"):
        manager.register(SimpleNamespace(overflowml_planned=hookimpl(wrapper=True)(wrapper)), "wrapping")
    assert "wrapping" not in manager.names()


class Entry:
    """What importlib.metadata gives for an entry point."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def load(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_one_broken_entry_point_does_not_stop_the_others(monkeypatch, caplog):
    entries = [
        Entry("a-broken", ImportError("no module x")),
        Entry("b-good", plugin(planned=lambda: None)),
        Entry("c-odd", plugin(nonsense=lambda: None)),
    ]
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: entries)
    loaded = plugins.Plugins({"builtin": builtin})
    assert loaded.names() == ("b-good", "builtin")
    assert set(loaded.faults) == {"a-broken", "c-odd"}
    assert "plugin a-broken cannot be used: ImportError: no module x" in caplog.text


def test_a_plugin_can_be_left_out(monkeypatch):
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: [Entry("mine", plugin(planned=lambda: None))])
    monkeypatch.setenv("OVERFLOWML_DISABLE_PLUGINS", "other, mine")
    assert plugins.Plugins({}).names() == ()


def test_the_builtin_plugin_is_asked_last():
    asked = plugins.Plugins({"builtin": builtin}, load_entry_points=False)
    asked.register(plugin(plan=lambda: PLAN), "mine")
    assert asked.plan(NETWORK, MACHINE, Workload(), Limits()) is PLAN
