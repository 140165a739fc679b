"""The recorder: saves when it should, costs no hook afterwards, and keeps no model alive."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overflowml_core import heat_recorder
from overflowml_core.heat_recorder import HeatRecorder
from overflowml_core.heat_store import load_heat
from tests.core.heats import FINGERPRINT, Engine, bank, report

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    return tmp_path


def recorded(engine: Engine) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    HeatRecorder(engine, "/models/moe").begin([module])
    return module


def test_saves_at_the_end_and_leaves_no_hook():
    engine = Engine()
    module = recorded(engine)
    engine.counted = report(bank((2, 0, 1, 1)))
    module(torch.zeros(1, 2))
    assert load_heat(FINGERPRINT) is None
    engine.detach()
    (run,) = load_heat(FINGERPRINT).runs
    assert (run.source, run.report) == ("/models/moe", engine.counted)
    assert run.pass_s > 0
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_saves_now_and_then_and_counts_nothing_twice(monkeypatch):
    monkeypatch.setattr(heat_recorder, "_LOOK_S", 0.0)
    monkeypatch.setattr(heat_recorder, "_SAVE_S", 0.0)
    engine = Engine()
    module = recorded(engine)
    for tokens in ((2, 0, 1, 1), (4, 0, 1, 3), (4, 2, 1, 5)):
        engine.counted = report(bank(tokens))
        module(torch.zeros(1, 2))
        assert load_heat(FINGERPRINT).banks[0].counts == tokens
    engine.detach()
    assert load_heat(FINGERPRINT).banks[0].counts == (4, 2, 1, 5)
    assert len(load_heat(FINGERPRINT).runs) == 1


def test_a_pass_that_fails_disturbs_nothing():
    engine = Engine()
    module = recorded(engine)
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3))
    engine.counted = report(bank((2, 0, 1, 1)))
    module(torch.zeros(1, 2))
    engine.detach()
    assert load_heat(FINGERPRINT).banks[0].counts == (2, 0, 1, 1)


def test_a_run_without_a_token_is_none():
    engine = Engine()
    recorded(engine)
    engine.detach()
    assert load_heat(FINGERPRINT) is None


def test_what_the_last_look_saw_is_saved_when_the_engine_is_let_go(monkeypatch):
    monkeypatch.setattr(heat_recorder, "_LOOK_S", 0.0)
    engine = Engine()
    module = recorded(engine)
    gone = weakref.ref(engine)
    engine.counted = report(bank((2, 0, 1, 1)))
    module(torch.zeros(1, 2))
    engine.counted = replace(engine.counted, stall_s=9.0)  # nobody looked again
    del engine
    gc.collect()
    assert gone() is None
    assert load_heat(FINGERPRINT).runs[0].report.stall_s == 0.5


def test_a_script_that_releases_nothing_saves_at_its_end(tmp_path):
    code = """
import torch
from overflowml_core.heat_recorder import HeatRecorder
from tests.core.heats import Engine, bank, report
engine = Engine()
module = torch.nn.Linear(2, 2)
HeatRecorder(engine, "/models/moe").begin([module])
engine.counted = report(bank((2, 0, 1, 1)))
module(torch.zeros(1, 2))
"""
    environment = {**os.environ, "OVERFLOWML_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_heat(FINGERPRINT).banks[0].counts == (2, 0, 1, 1)
