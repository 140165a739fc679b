"""The disk and load parts: the model that is made, the sides' processes, the order of turns, and the figures."""

# ruff: noqa: E402 -- only where there is torch

from __future__ import annotations

import json
import os
import signal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import stream_disk
from report import Report
from safetensors.torch import load_file
from stream_disk import Contest, Result, Settings, add_figures, table
from stream_load import Load, extra_bytes
from stream_model import READY, Shape, make_model, weight_files
from stream_worker import SideFailed, Worker

TINY = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=50)


def figures(report):
    return {figure["name"]: figure["value"] for figure in report.figures}


# ---- the model


def test_the_made_model_loads_whole_from_shards_below_their_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    total_bytes = make_model(tmp_path, TINY, shard_bytes=50_000)
    shards = [load_file(file) for file in weight_files(tmp_path)]
    sizes = [sum(t.nbytes for t in shard.values()) for shard in shards]
    assert len(shards) > 1
    assert max(sizes) <= 50_000
    assert sum(sizes) == total_bytes == int((tmp_path / READY).read_text())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for shard in shards for name in shard)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.isfinite(model(input_ids=torch.tensor([[1]])).logits).all()


def test_the_default_model_has_the_bytes_that_the_issue_asks_for():
    assert sum(2 * torch.Size(size).numel() for _, size in Shape().weights()) >= 6 * 10**9


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no \.safetensors file"):
        weight_files(tmp_path)


# ---- the processes


def test_a_worker_answers_reports_what_fails_and_ends(tmp_path):
    worker = Worker("side", tmp_path / "log")
    try:
        assert worker.ask("forget", files=[]) == {"ranges": 0}
        with pytest.raises(SideFailed, match="KeyError: 'nothing'"):
            worker.load("nothing", tmp_path, tmp_path / "scratch", 1)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(SideFailed, match=r"killed by SIGKILL: it printed nothing"):
            worker.ask("forget", files=[])
    finally:
        worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_worker_that_hangs_is_given_up(tmp_path):
    worker = Worker("side", tmp_path / "log", answer_s=0.2)
    try:
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(SideFailed, match=r"forget: no answer within"):
            worker.ask("forget", files=[])
    finally:
        worker.close()


# ---- the contest, with workers that only take notes


class FakeWorker:
    log: list
    broken = "accelerate"

    def __init__(self, name, log, python="", cage=None):
        self.name, self.pid, self.closed = name, 0, False

    def ready(self, imports, threads=0):
        self.log.append((self.name, "ready"))

    def load(self, side, model, scratch, budget_bytes):
        self.log.append((self.name, "load", model.name))
        return {"seconds": 1.0}

    def passes(self, count, untimed=0, logits=None):
        if self.name == self.broken and untimed:
            raise SideFailed("out of memory")
        self.log.append((self.name, "passes", untimed, count))
        if logits:
            logits.write_bytes(b"\0" * 8)
        return {"seconds": [2.0] * count, "read_bytes": [10] * count, "told": {"streamed_bytes": 10}}

    def forget(self, files):
        self.log.append((self.name, "forget"))

    def wait_until_quiet(self):
        pass

    def close(self):
        self.closed = True
        self.log.append((self.name, "close"))


@pytest.fixture
def contest(tmp_path, monkeypatch):
    make_model(tmp_path / "model", TINY)
    monkeypatch.setattr(FakeWorker, "log", [], raising=False)
    monkeypatch.setattr(stream_disk, "Worker", FakeWorker)
    monkeypatch.setattr(stream_disk, "make_cage", lambda *_: None)
    monkeypatch.setattr(stream_disk, "read_rate", lambda files, in_flight: 1000.0 * in_flight)
    (tmp_path / "work").mkdir()
    return Settings(tmp_path / "model", tmp_path / "work", 100, 50, passes=4, sides=("ours", "accelerate", "airllm", "resident"))


def test_a_side_that_fails_is_noted_and_the_others_go_on_in_turn(contest):
    notes: list[str] = []
    with Contest(contest, notes) as running:
        running.run()
    assert running.results["ours"].seconds == [2.0] * 4
    assert running.results["accelerate"].error == "out of memory"
    assert "give --airllm" in running.results["airllm"].error
    assert {"accelerate: out of memory", "no control group can be made here: no side has a memory limit"} <= set(notes)
    turns = [entry[0] for entry in FakeWorker.log if entry[1:] == ("passes", 1, stream_disk.TURN_PASSES)]
    assert turns == ["ours", "resident", "resident", "ours"]
    assert {entry[0] for entry in FakeWorker.log if entry[1] == "close"} == {"ours", "accelerate", "resident"}
    assert [len(found) for found in running.rates.values()] == [2, 2]


def test_without_a_limit_every_side_forgets_its_pages_before_each_turn(contest):
    with Contest(contest, []) as running:
        running.run()
    first = next(number for number, entry in enumerate(FakeWorker.log) if entry[1:] == ("passes", 1, 2))
    assert ("resident", "forget") in FakeWorker.log[:first]
    assert ("ours", "load", "model") in FakeWorker.log


def test_an_interrupt_ends_all_processes(contest, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream_disk, "read_rate", interrupted)
    with pytest.raises(KeyboardInterrupt), Contest(contest, []) as running:
        running.run()
    assert {entry[0] for entry in FakeWorker.log if entry[1] == "close"} == {"ours", "accelerate", "resident"}


# ---- the figures


def _told(streamed_bytes):
    return {"streamed_bytes": streamed_bytes, "peak_bytes": 90, "budget_bytes": 100}


def test_figures_where_reading_is_the_bound():
    report = Report("stream")
    results = {
        "ours": Result([5.0, 4.0, 4.5], [4000, 4000, 4000], _told(4000)),
        "accelerate": Result([9.0], [6000]),
        "resident": Result([2.0], [0]),
        "airllm": Result(error="left out"),
    }
    add_figures(report, results, 1000.0)
    found = figures(report)
    assert found["disk.read_fraction"] == pytest.approx(4000 / 4.5 / 1000)
    assert found["disk.over_limit"] == pytest.approx(4.5 / 4.0)
    assert found["disk.vs_accelerate"] == 2.0
    assert found["disk.ours.peak_over_budget"] == 0.9
    assert "disk.vs_airllm" not in found


def test_figures_where_computing_is_the_bound_or_the_cache_helped():
    report = Report("stream")
    add_figures(report, {"ours": Result([3.0], [1000], _told(4000)), "resident": Result([2.0], [0])}, 1000.0)
    found = figures(report)
    assert found["disk.over_limit"] == 1.5
    assert found["disk.read_fraction"] == pytest.approx(1000 / 3.0 / 1000)


def test_a_side_without_a_pass_is_a_row_with_its_error():
    text = table([{"side": "airllm", "error": "a | b\nc"}])
    assert text.splitlines()[-1] == "| airllm | | | | | | | a / b c |"


def test_extra_bytes_are_those_over_imports_budget_and_block():
    load = Load(300, 2000, 2000, 1.0, 1.0, 0, {"budget_bytes": 1500, "block_bytes": 150})
    assert extra_bytes(load) == 50
