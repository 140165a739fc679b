"""Options reach the planner as what they say."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import typer

from overflowml_core import session
from overflowml_core.cli.options import Request, takes_request
from overflowml_core.cli.question import machine_of, question_of
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Workload
from overflowml_core.formats import Format
from overflowml_core.inspect.machine_file import machine_to_json
from overflowml_core.inspect.named import named_machine

GB = 10**9


def test_every_option_reaches_the_request():
    seen = []
    app = typer.Typer(add_completion=False)
    app.command()(takes_request(lambda request: seen.append(request)))
    given = {
        **{
            "--vram": "8GB",
            "--ram": "9GB",
            "--reserve": "1GB",
            "--quality": "any",
            "--gpu": "G",
            "--machine": "m.json",
            "--dtype": "float16",
        },
        **{f"--{name}": i for i, name in enumerate(("height", "width", "frames", "batch", "steps", "prompt-tokens", "new-tokens"), 2)},
    }
    words = [str(word) for option in given.items() for word in option]
    words = ["40", "--no-quantize", "--no-disk", "--moe", "120", "12", "128", "8", *words]
    app(words, standalone_mode=False)
    (request,) = seen
    plain = Request(source="40")
    same = [field.name for field in fields(Request) if getattr(request, field.name) == getattr(plain, field.name)]
    assert same == ["source"]
    assert request.moe == (120.0, 12.0, 128, 8)


def test_own_options_of_a_command_stand_behind_those_of_the_request():
    def command(request: Request, more: bool = False) -> None:
        raise AssertionError(request, more)

    names = list(inspect.signature(takes_request(command)).parameters)
    assert names == [*(field.name for field in fields(Request)), "more"]


def test_sizes_become_limits():
    limits = question_of(Request(source="40", vram="8GB", ram="16GiB", reserve="1GB", no_disk=True, quality="any")).limits
    assert (limits.device_bytes, limits.host_bytes, limits.reserve_bytes) == (8 * GB, 16 * 2**30, GB)
    assert (limits.allow_disk, limits.quality) == (False, "any")


@pytest.mark.parametrize("text", ["0", "0GB", " 0.0 MiB "])
def test_nothing_may_be_reserved(text):
    assert question_of(Request(source="40", reserve=text)).limits.reserve_bytes == 0


def test_the_workload_is_passed_on():
    asked = Request(source="40", height=1, width=2, frames=3, batch=4, steps=5, prompt_tokens=6, new_tokens=7)
    assert question_of(asked).workload == Workload(1, 2, 3, 4, 5, 6, 7)


def test_ram_of_a_named_gpu_is_its_machine_and_no_limit():
    question = question_of(Request(source="40", gpu="RTX 5090", ram="194GB"))
    assert question.machine.host.total_bytes == 194 * GB
    assert question.limits.host_bytes is None
    assert question.machine.named


def test_a_machine_file_is_the_machine_and_the_host_of_a_named_gpu(tmp_path):
    file = tmp_path / "machine.json"
    machine = named_machine("RTX 3060", ram_bytes=64 * GB)
    file.write_text(machine_to_json(machine))
    assert machine_of(Request(source="40", machine=file)) == machine
    both = machine_of(Request(source="40", machine=file, gpu="RTX 4090"))
    assert both.accelerators[0].name == "NVIDIA GeForce RTX 4090"
    assert both.host == machine.host


def test_no_quantize_excludes_every_format(monkeypatch):
    forms = (Format("fp8", 8, "minimal", 0.01), Format("int4", 4.5, "any", 0.1))
    monkeypatch.setattr(session.plugins(), "formats", lambda machine: forms)
    limits = question_of(Request(source="40", vram="8GB", no_quantize=True)).limits
    assert limits.excluded == {("fp8", "*"), ("int4", "*")}
    assert limits.device_bytes == 8 * GB


def test_with_no_quantize_no_way_that_would_run_has_a_format():
    plan = question_of(Request(source="40", gpu="RTX 5090", ram="194GB", no_quantize=True)).plan()
    assert plan.formats == ()
    assert not [r.strategy for r in plan.rejected if r.viable and " " in r.strategy]


def test_a_mixture_of_experts_has_the_bytes_of_its_source():
    question = question_of(Request(source="120", moe=(120.0, 12.0, 128, 8)))
    assert question.network.weight_bytes == 120 * GB
    assert question.forecast


def test_a_size_is_a_forecast_and_a_folder_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert question_of(Request(source="40")).forecast
    assert not session.is_forecast(str(tmp_path))


@pytest.mark.parametrize(("dtype", "words"), [("float17", "no dtype of torch"), ("nn", "no dtype of torch")])
def test_a_dtype_that_torch_does_not_have(dtype, words, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OverflowmlError, match=words):
        question_of(Request(source=str(tmp_path), dtype=dtype))


def test_what_is_cheap_to_refuse_is_refused_first(monkeypatch):
    monkeypatch.setattr(session, "describe", lambda *_: pytest.fail("the model was described"))
    monkeypatch.setattr(session, "detect", lambda: pytest.fail("the machine was detected"))
    for wrong in ({"batch": 0}, {"vram": "x"}, {"quality": "best"}):
        with pytest.raises(OverflowmlError):
            question_of(Request(source="40", **wrong))
