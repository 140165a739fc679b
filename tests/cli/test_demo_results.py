"""The verdict, the summary and the exit code say what was measured, and can say no."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from overflowml_core.cli.demo import command, run_demo
from overflowml_core.cli.demo.cases import BUILD, CASES, MANAGED, CaseInfo
from overflowml_core.cli.demo.faults import ChildFailed, DemoUnavailable
from overflowml_core.cli.demo.picture import draw_memory
from overflowml_core.cli.demo.process import Job
from overflowml_core.cli.demo.results import Comparison, Measured
from overflowml_core.cli.demo.sampler import Sample
from overflowml_core.cli.demo.table import comparison_table

MIB = 2**20
DIRECT_RUN = Measured(
    device="cpu",
    load_s=0.5,
    run_s=1.0,
    device_peak_bytes=None,
    digest="a",
    output="Paris",
    samples=(Sample(0.1, 5 * MIB, 20 * MIB, 0, 0), Sample(0.2, 12 * MIB, 290 * MIB, 0, 0)),
)
MANAGED_RUN = dataclasses.replace(
    DIRECT_RUN,
    run_s=2.0,
    device_peak_bytes=90 * MIB,
    samples=(Sample(0.1, 80 * MIB, 3 * MIB, 0, 70 * MIB), Sample(0.2, 110 * MIB, 3 * MIB, 0, 90 * MIB)),
    predicted_peak_bytes=95 * MIB,
    plan_fingerprint="f00d",
    strategy="stream",
)
GOOD = Comparison("tiny", "A tiny model", 300 * MIB, 100 * MIB, 20 * MIB, DIRECT_RUN, MANAGED_RUN)
TINY = CaseInfo("tiny", "A tiny model", "none", "tiny-1", 0, (), MIB, 20 * MIB, None)


def managed(**changes: object) -> Comparison:
    return dataclasses.replace(GOOD, managed=dataclasses.replace(MANAGED_RUN, **changes))


def test_good_run_has_no_failures():
    assert GOOD.failures() == ()
    assert GOOD.identical


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        (managed(digest="b"), "another result"),
        (managed(device_peak_bytes=100 * MIB + 1), "measured peak"),
        (managed(device_peak_bytes=0), "measured no memory"),
        (managed(device_peak_bytes=None), "measured no memory"),
        (managed(samples=(Sample(0.1, 120 * MIB + 1, 0, 0, 0),)), "grew by"),
        (managed(samples=(Sample(0.1, 100 * MIB, 20 * MIB + 1, 0, 0),)), "with mapped files grew by"),
        (managed(samples=()), "not sampled"),
    ],
)
def test_each_breach_is_named(comparison, said):
    (failure,) = comparison.failures()
    assert said in failure
    assert failure.startswith("tiny: ")


def test_peak_equal_to_the_budget_is_within_it():
    assert managed(device_peak_bytes=100 * MIB, samples=(Sample(0.1, 120 * MIB, 0, 0, 0),)).failures() == ()


def test_host_memory_is_not_limited_on_an_accelerator():
    comparison = managed(device="cuda", samples=(Sample(0.1, 900 * MIB, 0, 90 * MIB, 90 * MIB),))
    assert comparison.anonymous_limit_bytes is None
    assert comparison.failures() == ()


def test_measured_survives_the_way_through_json():
    assert Measured.from_json(MANAGED_RUN.to_json()) == MANAGED_RUN


@pytest.mark.parametrize("info", CASES, ids=lambda info: info.name)
def test_memory_check_of_each_case_can_fail(info):
    # A process that held all weights would be over the limit: a third of them and the allowance stay well below.
    weights_bytes = {"smollm2": 269_060_552, "flux": 1_500_000_000}[info.name]
    assert weights_bytes // 3 + info.allowance_bytes < 0.75 * weights_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_picture_is_a_png_with_both_runs(tmp_path, device):
    runs = (dataclasses.replace(run, device=device) for run in (DIRECT_RUN, MANAGED_RUN))
    comparison = dataclasses.replace(GOOD, **dict(zip(("direct", "managed"), runs, strict=True)))
    draw_memory(comparison, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_table_shows_both_runs_and_the_verdict():
    text = io.StringIO()
    Console(file=text, width=120).print(comparison_table(managed(digest="b")))
    for word in ("direct", "overflowml", "100.0 MiB", "95.0 MiB", "90.0 MiB", "110.0 MiB", "120.0 MiB", "no"):
        assert word in text.getvalue()


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The whole command with stand-ins for the child processes; returns (run, jobs, what each mode gives)."""
    jobs: list[Job] = []
    given: dict[str, object] = {"direct": DIRECT_RUN, MANAGED: MANAGED_RUN}

    def run_job(job: Job, watch) -> Measured | None:
        jobs.append(job)
        watch({"stage": "steps", "done": 1, "total": 4})
        if job.mode == BUILD:
            header = json.dumps({"t": {"dtype": "U8", "shape": [300 * MIB], "data_offsets": [0, 300 * MIB]}}).encode()
            with (job.folder / "model.safetensors").open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + 300 * MIB)  # a hole: it takes no room
            return None
        if job.mode == MANAGED:
            watch({"plan": "Plan [stream]: one [block]"})
            (job.work / "image.png").write_bytes(b"managed")
        result = given[job.mode]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "CASES", (TINY,))
    monkeypatch.setattr(command, "run_job", run_job)
    text = io.StringIO()

    def run() -> tuple[int, str, dict[str, object]]:
        code = run_demo(tmp_path / "out", console=Console(file=text, width=200))
        return code, text.getvalue(), json.loads((tmp_path / "out" / "summary.json").read_text())

    return run, jobs, given, tmp_path / "out"


def test_demo_returns_0_and_writes_everything(tiny_demo):
    run, jobs, _, out = tiny_demo
    code, text, summary = run()
    assert code == 0
    assert [job.mode for job in jobs] == [BUILD, "direct", MANAGED]
    assert jobs[2].budget_bytes == 100 * MIB
    assert "Plan [stream]: one [block]" in text
    (entry,) = summary["runs"]
    assert entry["weights_bytes"] == 300 * MIB
    assert entry["budget_bytes"] == 100 * MIB
    assert entry["predicted_peak_bytes"] == 95 * MIB
    assert entry["measured_peak_bytes"] == 90 * MIB
    assert entry["identical"] is True
    assert (entry["seconds_direct"], entry["seconds_managed"]) == (1.5, 2.5)
    assert entry["output"] == "Paris"
    assert entry["anonymous_growth_bytes"] == 110 * MIB
    assert entry["anonymous_limit_bytes"] == 120 * MIB
    assert entry["plan_fingerprint"] == "f00d"
    assert (out / "tiny-memory.png").exists()
    assert (out / "tiny.png").read_bytes() == b"managed"


def test_second_demo_builds_nothing_again(tiny_demo):
    run, jobs, _, _ = tiny_demo
    run()
    run()
    assert [job.mode for job in jobs].count(BUILD) == 1


def test_demo_returns_1_and_says_what_differs(tiny_demo):
    run, _, given, _ = tiny_demo
    given[MANAGED] = dataclasses.replace(MANAGED_RUN, digest="b")
    code, text, summary = run()
    assert code == 1
    assert "FAILED tiny: the managed run gave another result" in text
    assert summary["runs"][0]["identical"] is False
    assert summary["runs"][0]["passed"] is False


def test_demo_returns_1_and_shows_the_last_lines_of_a_run_that_died(tiny_demo):
    run, _, given, _ = tiny_demo
    given[MANAGED] = ChildFailed("tiny, managed", -9, "the last [line]")
    code, text, summary = run()
    assert code == 1
    assert "signal 9" in text
    assert "the last [line]" in text
    assert summary["runs"][0]["passed"] is False


def test_unknown_case_names_the_known_ones(tmp_path):
    with pytest.raises(DemoUnavailable, match="smollm2, flux"):
        run_demo(tmp_path / "out", only="gpt")
    assert not (tmp_path / "out").exists()


def test_missing_package_is_said_first_with_what_installs_it(tmp_path, monkeypatch):
    info = dataclasses.replace(TINY, packages=(("a_package_that_nobody_has", "pip install it"),))
    monkeypatch.setattr(command, "CASES", (info,))
    with pytest.raises(DemoUnavailable, match="a_package_that_nobody_has is not installed; pip install it"):
        run_demo(tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
