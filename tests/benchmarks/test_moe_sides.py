"""The benchmark of mixtures of experts: the model that is made, its texts, the sides, the order of turns, and the figures."""

# ruff: noqa: E402 -- only where there is torch

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import moe
import moe_contest
import moe_predict
from moe_contest import Answers, Contest, Settings, differences, hit_rate
from moe_model import MoeShape, Skew, make_moe, text_of
from moe_side import MoeHost
from moe_trace import Trace, popularity
from report import Report
from safetensors import safe_open
from stream_worker import SideFailed

TINY = MoeShape(hidden=64, intermediate=32, layers=2, experts=8, per_token=2, heads=2, kv_heads=1, head=32, vocabulary=60)


def figures(report):
    return {figure["name"]: figure["value"] for figure in report.figures}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("moe") / "model"
    make_moe(made, TINY, shard_bytes=150_000)
    return made


# ---- the model


def test_the_files_are_those_that_the_class_itself_would_save(folder, tmp_path):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert type(model) is transformers.Qwen3MoeForCausalLM
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    model.save_pretrained(tmp_path)

    def tensors(files):
        for file in files:
            with safe_open(file, "pt") as opened:
                yield from ((name, opened.get_tensor(name)) for name in opened.offset_keys())

    ours, theirs = dict(tensors(folder.glob("*.safetensors"))), dict(tensors(tmp_path.glob("*.safetensors")))
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_the_default_model_is_as_large_as_the_issue_asks_for_and_in_proportion():
    shape = MoeShape()
    total_bytes = sum(2 * torch.Size(size).numel() for _, size in shape.weights())
    assert total_bytes >= 4 * 2**30
    assert shape.bank_bytes / total_bytes == pytest.approx(0.95, abs=0.02)
    assert shape.per_token / shape.experts == 1 / 16


def test_a_skewed_router_prefers_some_experts_and_a_plain_one_less(tmp_path):
    most = {}
    for name, skew in (("skewed", Skew(static=0.7)), ("plain", Skew(static=0.0, context=1e-6, constant=1e-6))):
        shape = MoeShape(256, 8, 2, 64, 4, 4, 2, 32, 500, skew)
        make_moe(tmp_path / name, shape)
        host = MoeHost()
        host.load({"side": "resident", "model": str(tmp_path / name)})
        ids = text_of(200, 500, seed=1, skew=skew)
        host.answer({"prompt": ids, "text": [], "trace": str(tmp_path / "trace")})
        most[name] = sum(popularity(Trace.read(tmp_path / "trace"))[:16]) / 4
    assert most["skewed"] > 0.6
    assert most["plain"] < 0.5


def test_texts_share_common_words_and_have_topics_of_their_own():
    first, again, other = text_of(400, 5000, 1), text_of(400, 5000, 1), text_of(400, 5000, 2)
    assert first == again
    shared = len(set(first) & set(other)) / len(set(first))
    assert 0.05 < shared < 0.5
    assert len(set(text_of(400, 5000, 1, Skew(topic=1.0)))) <= 48


# ---- the sides


def test_ours_answers_as_resident_does_and_counts_its_experts(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))
    ids = text_of(16, TINY.vocabulary, 3)
    shape = replace(TINY, hidden=128, intermediate=128, experts=64, per_token=4)
    assert make_moe(tmp_path / "model", shape) > 12_000_000
    answers = {}
    for side, budget_bytes in (("resident", 0), ("ours", 8_000_000)):
        host = MoeHost()
        host.load({"side": side, "model": str(tmp_path / "model"), "budget_bytes": budget_bytes, "scratch": str(tmp_path)})
        files = {name: str(tmp_path / f"{side}.{name}") for name in ("logits", "trace")}
        answers[side] = host.answer({"prompt": ids[:12], "text": ids[12:], **files})
        assert len(answers[side]["seconds"]) == len(answers[side]["read_bytes"]) == 4
        host.quit({})
    ours, resident = (torch.frombuffer(bytearray((tmp_path / f"{name}.logits").read_bytes()), dtype=torch.float32) for name in answers)
    assert ours.numel() == 5 * TINY.vocabulary
    assert torch.allclose(ours, resident, atol=0.05)
    trace = Trace.read(tmp_path / "ours.trace")
    assert [one.tokens for one in trace.passes] == [12] + [1] * 4
    before, after = answers["ours"]["told_before"]["experts"], answers["ours"]["told"]["experts"]
    assert after["requests"] - before["requests"] == 4 * shape.layers * shape.per_token
    assert before["requests"] == sum(len(bank) for bank in trace.passes[0].banks)


class FakeWorker:
    log: list
    broken = "accelerate"

    def __init__(self, name, log, python="", cage=None, script=""):
        self.name, self.pid = name, 0

    def ready(self, imports, threads=0):
        return {}

    def load(self, side, model, scratch, budget_bytes):
        self.log.append((self.name, "load"))
        return {"seconds": 1.0, "told": {"expert_cache_bytes": budget_bytes - 300}}

    def ask(self, do, **arguments):
        if do == "predict":
            self.log.append((self.name, do, arguments["budget_bytes"]))
            passes = {"passes": {"prefill": 3.0}, "hit_rates": {"token": 0.7}, "missed_bytes": {"token": 2_000_000}}
            return {"token_s": 0.5, "expert_cache_bytes": arguments["budget_bytes"] - 100, **passes}
        if do in ("quit", "calibrate"):
            self.log.append((self.name, do))
            return {"seconds": 1.0}
        if self.name == self.broken and "logits" in arguments:
            raise SideFailed("out of memory")
        text = tuple(arguments["text"])
        self.log.append((self.name, do, len(arguments["prompt"]), text))
        counts = {"requests": 10, "hits": 3, "prefetch_hits": 0, "fetched_bytes": 0}
        told = {"requests": 10 + 8 * len(text), "hits": 3 + 7 * len(text), "prefetch_hits": len(text), "fetched_bytes": 6 * len(text)}
        common = {"strategy": "experts", "expert_cache_bytes": 7}
        return {
            "prefill_s": 2.0,
            "prefill_read_bytes": 50,
            "seconds": [0.4] * len(text),
            "read_bytes": [5] * len(text),
            "said": [1] * (len(text) + 1),
            "told_before": {"experts": counts, **common},
            "told": {"experts": told, **common},
        }

    def close(self):
        self.log.append((self.name, "closed"))


@pytest.fixture
def contest(monkeypatch, tmp_path, folder):
    FakeWorker.log = []
    for module in (moe_contest, moe_predict):
        monkeypatch.setattr(module, "Worker", FakeWorker)
        monkeypatch.setattr(module, "make_cage", lambda *_: None)
    monkeypatch.setattr(moe_contest, "read_rate", lambda files, in_flight: 100.0)
    return Settings(folder, tmp_path, 1000, 100, 8, 4, 2, 2, TINY.vocabulary)


def test_sides_take_turns_with_texts_of_their_own_and_one_that_fails_is_out(contest):
    notes = []
    with Contest(contest, notes) as running:
        running.run()
    log = FakeWorker.log
    answers = [(entry[0], entry[3]) for entry in log if entry[1] == "answer"]
    first, second = (tuple(contest.answer_of(turn, 8, 4)["text"]) for turn in (0, 1))
    assert first != second
    assert answers[3:] == [("ours", first), ("resident", first), ("resident", second), ("ours", second)]
    assert running.results["accelerate"].error == "out of memory"
    assert any("accelerate: out of memory" in note for note in notes)
    assert [entry for entry in log if entry[1] == "quit"] == [("ours", "quit"), ("resident", "quit")]
    assert running.results["ours"].token_s == pytest.approx(0.4)
    assert hit_rate(running.results["ours"].told) == 7 / 8


def test_predictions_are_held_against_what_a_fresh_load_shows(contest):
    heat = contest.work / moe_predict.HEAT / "map.json"
    heat.parent.mkdir(parents=True)
    heat.write_text("of the session")
    moe_predict.first_session(contest)
    session = {entry[3] for entry in FakeWorker.log if entry[1] == "answer"}
    assert [entry for entry in FakeWorker.log if entry[1] == "quit"] == [("ours", "quit")]
    FakeWorker.log.clear()
    heat.write_text("of a budget before")
    report, notes = Report("moe"), []
    sizes = moe_predict.measure(contest, [500, 900], report, notes)
    assert heat.read_text() == "of the session"
    assert [entry[0] for entry in FakeWorker.log if entry[1] == "calibrate"] == ["calibrate"] * 4
    assert notes == []
    assert [size.budget_bytes for size in sizes] == [500, 900]
    assert figures(report)["prediction.max_rel_error"] == pytest.approx(0.25)
    # The load kept 200 bytes more for other things than a plan does that knows the workload.
    assert [entry[2] for entry in FakeWorker.log if entry[1] == "predict"] == [500, 300, 300, 900, 700, 700]
    answers = [entry[3] for entry in FakeWorker.log if entry[1] == "answer"]
    assert answers[:4] == answers[4:]  # each budget has the same texts: one to warm up and three that are measured
    assert len({*answers[:4]} - session) == 4
    row = "| 0.00 GB | 0.00 GB | experts | 0.700 | 0.875 | 2 MB | 0 MB | 0.500 s | 0.400 s | +25.0% | 3.00 s | 2.00 s |"
    assert row in moe_predict.table(sizes)


def test_a_budget_whose_plan_predicts_nothing_is_noted(contest, monkeypatch):
    monkeypatch.setattr(FakeWorker, "ask", lambda self, do, **_: {"token_s": None, "expert_cache_bytes": 0, "seconds": 1.0})
    notes = []
    assert moe_predict.measure(contest, [500], Report("moe"), notes) == []
    assert notes == ["a budget of 500 bytes: its plan predicts no time"]


def test_budgets_leave_shares_of_the_experts_to_the_cache(contest, monkeypatch):
    assert moe_predict.budgets_of(contest, (0.1, 0.5), bank_bytes=2000) == [300, 1100]
    monkeypatch.setattr(FakeWorker, "ask", lambda self, do, **_: {"expert_cache_bytes": 0})
    with pytest.raises(SideFailed, match="keeps no experts apart"):
        moe_predict.budgets_of(contest, (0.1,), bank_bytes=2000)


# ---- the figures


def test_figures_by_hand():
    told = ({"experts": {"fetched_bytes": 100}}, {"experts": {"fetched_bytes": 500}})
    ours = Answers(prefill_s=[2.0], prefill_read_bytes=[9], seconds=[0.2, 0.2], read_bytes=[300, 300], told=[told])
    slow = Answers(prefill_s=[5.0], prefill_read_bytes=[9], seconds=[4.0], read_bytes=[9000])
    whole = Answers(prefill_s=[1.0], prefill_read_bytes=[0], seconds=[0.05, 0.05], read_bytes=[0, 0])
    report = Report("moe")
    moe.add_figures(report, {"ours": ours, "accelerate": slow, "resident": whole}, rate_bytes_per_s=2000.0)
    found = figures(report)
    assert found["decode.vs_accelerate"] == pytest.approx(20)
    assert found["prefill.vs_accelerate"] == pytest.approx(2.5)
    assert found["decode.vs_resident"] == pytest.approx(0.25)
    assert found["decode.limit_s"] == pytest.approx(0.1)  # 200 bytes a token by the engine's account, which is less than the kernel's
    assert found["decode.share_of_limit"] == pytest.approx(0.5)


def test_differences_are_of_the_tokens_that_both_sides_made(tmp_path):
    settings = SimpleNamespace(vocabulary=2)
    contest = SimpleNamespace(
        results={"accelerate": Answers(said=[[1, 0]]), "resident": Answers(said=[[1, 1, 0]])},
        logits=lambda name, turn: tmp_path / f"{name}-{turn}",
    )
    (tmp_path / "accelerate-0").write_bytes(torch.tensor([0.0, 1.0, 2.0, 0.0]).numpy().tobytes())
    (tmp_path / "resident-0").write_bytes(torch.tensor([0.0, 1.5, 0.0, 0.0, 9.0, 0.0]).numpy().tobytes())
    assert differences(contest, settings) == {"accelerate": (2.0, 0.5)}


def test_the_script_writes_what_it_measured(contest, monkeypatch, tmp_path, folder):
    options = moe.parser().parse_args(["--model", str(folder), "--budget", "1MB", "--prompt", "8", "--new", "4", "--part", "sides"])
    options.json, options.table = tmp_path / "moe.json", tmp_path / "moe.md"
    monkeypatch.setattr(moe_predict, "calibrate", lambda settings: 1.0)
    run = moe.Run(options, tmp_path)
    monkeypatch.setattr(moe, "differences", lambda *_: {})
    run.sides()
    run.write()
    assert json.loads(options.json.read_text())["benchmark"] == "moe"
    assert "| ours | 1.0 s | 2.00 s | 0.400 s | 2.50 |" in options.table.read_text()
