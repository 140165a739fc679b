"""Each command prints what it was asked for, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from overflowml_core import session
from overflowml_core.bare import bare_network
from overflowml_core.cli import calibrate as calibrate_command
from overflowml_core.facts import Workload
from overflowml_core.inspect.machine_file import machine_of_json, read_machine
from overflowml_core.inspect.named import named_machine
from overflowml_core.plan import Avoided, Plan, WhatIf

GPU = ("--gpu", "RTX 5090", "--ram", "194GB")


def test_compare_lists_what_would_run_what_would_not_and_why(run):
    status, out, _ = run("plan", "40", "--compare", *GPU)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "Hardware: NVIDIA GeForce RTX 5090 (32.00 GiB), 180.68 GiB RAM"
    heading = next(line for line in lines if line.startswith("#"))
    assert heading.split() == ["#", "Speed", "Strategy", "Est", "VRAM", "Quality", "risk", "Time"]
    assert next(line for line in lines if "<- recommended" in line).split()[2] == "stream"
    assert "Rejected:" in lines
    assert [line for line in lines if line.startswith("  direct: needs ") and " of " in line]
    assert "=== Reasoning ===" in lines


def test_compare_of_a_mixture_of_experts_tells_its_answers(run):
    status, out, _ = run("plan", "120", "--moe", 120, 12, 128, 8, "--compare", *GPU)
    assert status == 0
    assert out.count("tokens/s") >= 2
    assert "<- recommended" in out


def test_ways_that_are_only_forecast_say_so(run, monkeypatch):
    monkeypatch.setattr(session, "abilities_of", lambda forecast: frozenset())
    out = run("plan", "120", "--moe", 120, 12, 128, 8, "--compare", *GPU)[1]
    assert "<- recommended (not carried out by this version)" in out


def test_traps_are_named_with_what_is_done(monkeypatch, run, diffusion):
    plan = replace(diffusion.plan, traps=(Avoided("fp8-offload", "it would crash", "weights stay in BF16"),))
    monkeypatch.setattr(session, "make_plan", lambda *_, **__: plan)
    out = run("plan", "40", "--compare", *GPU)[1]
    assert "  Known traps handled:\n    - fp8-offload: it would crash; weights stay in BF16\n" in out


def test_without_compare_the_summary_is_printed(run, diffusion):
    assert run("plan", "40", *GPU)[1] == f"{diffusion.plan.summary()}\n"


def test_plan_as_json_holds_the_outlook_and_is_what_save_writes(run, tmp_path):
    status, out, err = run("plan", "40", *GPU, "--json", "--save", tmp_path / "plan.json")
    assert (status, err) == (0, "")
    plan = Plan.from_json(out)
    assert plan.outlook
    assert (tmp_path / "plan.json").read_text() == out


def test_files_are_named_on_standard_error(run, tmp_path):
    files = [tmp_path / name for name in ("page.html", "trace.json", "plan.json")]
    status, _, err = run("plan", "40", *GPU, "--html", files[0], "--trace", files[1], "--save", files[2])
    assert status == 0
    assert err.split() == [word for f, o in zip(files, ("--html:", "--trace:", "--save:"), strict=True) for word in ("written", o, str(f))]
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (("40", *GPU), 0, "yes"),
        (("40", "--gpu", "RTX 3060", "--ram", "8GB", "--vram", "100MB"), 1, "no"),
        (("4000", "--gpu", "RTX 3060", "--ram", "8GB", "--no-disk"), 1, "no"),
    ],
)
def test_can_run_answers_by_its_status_and_in_one_line(run, arguments, status, answer):
    ended, out, err = run("can-run", *arguments)
    assert (ended, err, out.count("\n")) == (status, "", 1)
    assert out.startswith(f"{answer}: ")
    ended, out, err = run("can-run", *arguments, "--json")
    document = json.loads(out)
    assert (ended, err) == (status, "")
    assert (document["answer"], document["exit_code"]) == (answer, status)
    assert (document["device_peak_bytes"] is None) == (answer == "no")


def test_can_run_does_not_know_where_nobody_knows_the_activations(run, monkeypatch):
    network = bare_network(10**9, Workload())
    unknown = replace(network, components=tuple(replace(c, profiles=(), activation_source="none") for c in network.components))
    monkeypatch.setattr(session, "describe", lambda *_: unknown)
    status, out, _ = run("can-run", "1", *GPU)
    assert (status, out.split(":")[0]) == (2, "unknown")
    assert "--reserve" in out
    assert run("can-run", "1", *GPU, "--reserve", "1GB")[0] == 0


def test_can_run_asks_for_what_this_version_carries_out(run):
    mixture = ("120", "--moe", "120", "12", "128", "8", "--gpu", "RTX 5090")
    status, out, _ = run("can-run", *mixture, "--ram", "196GB")
    assert (status, out.split(" on ")[0]) == (0, "yes: experts")
    status, out, _ = run("can-run", *mixture, "--ram", "80GB", "--no-disk", "--quality", "any")
    assert status == 1
    assert out.rstrip().endswith("int4, which this version does not carry out yet")


def test_can_run_needs_room_for_what_is_not_here_yet(run, monkeypatch):
    small = replace(session.detect(), disk_free_bytes=10**9)
    monkeypatch.setattr(session, "detect", lambda: small)
    status, out, _ = run("can-run", "2")
    assert status == 1
    assert out.startswith("no: the weights take 1.86 GiB and the disk has 953.7 MiB free")


def test_can_run_of_nonsense_is_no_answer(run):
    assert run("can-run", "forty")[0] == 2


def test_explain_tells_why_and_what_another_machine_would_buy(run, tmp_path):
    file = tmp_path / "plan.json"
    run("plan", "40", *GPU, "--save", file)
    status, out, _ = run("explain", file)
    assert status == 0
    for heading in ("Why stream", "Why not the others", "What another machine would buy"):
        assert f"=== {heading} ===" in out
    assert "a card with 48.00 GiB" in out
    document = json.loads(run("explain", file, "--json")[1])
    assert document["strategy"] == "stream"
    assert [way for way in document["viable"] if way["chosen"]]
    assert all(row["reason"] for row in document["rejected"])


def test_explain_reads_standard_input(run, monkeypatch, tmp_path, diffusion):
    file = tmp_path / "plan.json"
    file.write_text(diffusion.plan.to_json())
    with file.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        status, out, _ = run("explain", "-")
    assert status == 0
    assert diffusion.plan.fingerprint in out


def test_explain_tells_what_is_gained(run, tmp_path, diffusion):
    now_s = diffusion.plan.estimate.total_s
    outlook = (
        WhatIf("a faster card", "direct", now_s / 2, 1),
        WhatIf("a slow one", "cpu", now_s * 3, 1),
        WhatIf("the same", "stream", now_s, 1),
    )
    file = tmp_path / "plan.json"
    file.write_text(replace(diffusion.plan, outlook=outlook).to_json())
    out = run("explain", file)[1]
    assert [line.rsplit("  ", 1)[1] for line in out.splitlines()[-3:]] == ["2.00 x as fast", "3.00 x as slow", "none"]


@pytest.mark.parametrize("damage", ["cut", "edited", "another schema", "no JSON", "empty", "a list"])
def test_a_broken_plan_is_one_line(run, tmp_path, diffusion, damage):
    text = diffusion.plan.to_json()
    texts = {
        "cut": text[: len(text) // 2],
        "edited": text.replace('"stream"', '"direct"', 1),
        "another schema": text.replace('"schema": 3', '"schema": 99'),
        "no JSON": "stream",
        "empty": "",
        "a list": "[1, 2]",
    }
    file = tmp_path / "plan.json"
    file.write_text(texts[damage])
    status, out, err = run("explain", file)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_detect_writes_what_machine_reads(run, tmp_path):
    status, out, _ = run("detect", "--json")
    assert status == 0
    file = tmp_path / "machine.json"
    file.write_text(out)
    assert read_machine(file).host.core_count >= 1
    assert run("plan", "1", "--machine", file)[0] == 0


@pytest.mark.parametrize("gpu", ["RTX 5090", "M4 Max 128GB", "2x RTX 3060"])
def test_detect_shows_every_accelerator(run, monkeypatch, gpu):
    machine = named_machine(gpu, ram_bytes=64 * 10**9)
    monkeypatch.setattr(session, "detect", lambda: machine)
    status, out, _ = run("detect")
    assert status == 0
    assert out.count("GPU: ") == len(machine.accelerators)
    assert all(accelerator.name in out for accelerator in machine.accelerators)
    assert "BF16: yes" in out
    assert "from datasheets, not measured" in out


def test_calibrate_passes_its_arguments_on_and_shows_the_rates(run, monkeypatch):
    seen = []
    machine = named_machine("RTX 5090", ram_bytes=64 * 10**9)

    def measure(progress, quick, source):
        progress("disk reads")
        seen.append((quick, source))
        return machine

    monkeypatch.setattr(session, "calibrate", measure)
    status, out, err = run("calibrate", "--quick")
    assert (status, err, seen) == (0, "", [(True, None)])
    assert "to the device: 55 GB/s pinned" in out
    status, out, _ = run("calibrate", "some/model", "--json")
    assert (status, seen[1]) == (0, (False, "some/model"))
    assert machine_of_json(out) == machine
    assert calibrate_command.calibrate.__doc__
