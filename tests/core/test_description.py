"""Describing goes on where profiling fails, and asks for a profile once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from overflowml_core import registry, session
from overflowml_core.hookspecs import hookimpl
from overflowml_core.plugins import Plugins
from overflowml_core.work import PassProfile
from tests.planner.build import llm

NETWORK = llm(layers=2)


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host that describes every folder, and a function that gives it a profiler."""
    made = Plugins({"host": SimpleNamespace(overflowml_describe=hookimpl(lambda source: NETWORK))}, load_entry_points=False)
    monkeypatch.setattr(registry, "_plugins", [made])
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder, lambda measure: made.register(SimpleNamespace(overflowml_measure=hookimpl(measure)), "profiler")


def _profiled(network):
    (component,) = network.components
    return replace(network, components=(replace(component, profiles=(PassProfile("token", 1, 5),), activation_bytes=5),))


def test_a_profile_is_kept(host):
    folder, register = host
    calls = []
    register(lambda network: calls.append(network) or _profiled(network))
    first = session.describe(folder)
    assert first.components[0].activation_bytes == 5
    assert session.describe(folder) == first
    assert len(calls) == 1
    session.describe(folder, fresh=True)
    assert len(calls) == 2
    (folder / "config.json").write_text('{"other": 1}')
    session.describe(folder)
    assert len(calls) == 3


def test_a_copy_of_a_folder_has_the_same_profile_and_its_own_name(host, tmp_path):
    folder, register = host
    calls = []
    register(lambda network: calls.append(network) or _profiled(network))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text("{}")
    assert session.describe(folder).source == str(folder)
    assert session.describe(copy).source == str(copy)
    assert len(calls) == 1


def test_a_profiler_that_fails_costs_the_profile_and_nothing_else(host, caplog):
    folder, register = host
    register(lambda: 1 / 0)
    found = session.describe(folder)
    assert found.components == NETWORK.components
    assert "plugin profiler, overflowml_measure: ZeroDivisionError" in caplog.text
    caplog.clear()
    session.describe(folder)
    assert "ZeroDivisionError" in caplog.text  # asked again: a failure is not kept
