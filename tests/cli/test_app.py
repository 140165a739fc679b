"""The command line as a whole: what it is made of, and with which status it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from overflowml import __version__
from overflowml_core import session
from overflowml_core.cli import app
from overflowml_core.hookspecs import hookimpl
from overflowml_core.plan import Plan
from overflowml_core.plugins import Plugins

ROOT = Path(__file__).parents[2]
COMMANDS = ("plan", "can-run", "explain", "detect", "calibrate", "tune", "report", "doctor", "cache", "activate", "deactivate", "demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def in_a_process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'plugins')!r}]; sys.argv = {['overflowml', *arguments]!r}\n"
    code += "from overflowml_core.cli import main; main()"
    options = {"capture_output": True, **options}
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=120, check=False, **options)


def test_version(run):
    assert run("--version") == (0, f"overflowml {__version__}\n", "")


def test_help_names_every_command_and_every_status(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert all(f"{status} " in out for status in (0, 1, 2, 70, 130, 141))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"overflowml {command}" in out


def test_plan_is_printed_and_as_json_can_be_read_back(run, folder):
    status, out, _ = run("plan", folder, "--vram", "12MB", "--reserve", "1MB")
    assert status == 0
    assert "stream: " in out
    status, out, _ = run("plan", folder, "--vram", "12MB", "--reserve", "1MB", "--json")
    assert Plan.from_json(out).strategy == "stream"


def test_a_plan_that_does_not_fit_ends_with_1_and_its_suggestion_fits(run, folder):
    status, out, err = run("plan", folder, "--vram", "2MB", "--reserve", "100KB")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("overflowml: ")
    suggested = err.partition("--vram ")[2].partition(" ")[0]
    assert run("plan", folder, "--vram", suggested, "--reserve", "100KB")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "/no/such/folder"), ["/no/such/folder", "no such path"]),
        (("plan", "forty"), ["forty", "40GB"]),
        (("plan", "40", "--vram", "lots"), ["--vram='lots'", "8GB"]),
        (("plan", "40", "--vram", "-1"), ["--vram='-1'"]),
        (("plan", "40", "--ram", "0"), ["--ram='0'"]),
        (("plan", "40", "--batch", "0"), ["batch=0"]),
        (("plan", "40", "--steps", "-3"), ["steps=-3"]),
        (("plan", "40", "--quality", "best"), ["best", "lossless"]),
        (("plan", "40", "--gpu", "RTX 4900"), ["RTX 4900", "nearest", "NVIDIA GeForce RTX 40"]),
        (("plan", "40", "--machine", "/no/such/file"), ["/no/such/file"]),
        (("plan", "40", "--dtype", "bfloat16"), ["--dtype='bfloat16'", "leave it out"]),
        (("plan", "12", "--moe", "12", "120", "128", "8"), ["--moe", "120 billion", "12 billion"]),
        (("plan", "/", "--moe", "120", "12", "128", "8"), ["SOURCE='/'"]),
        (("plan", "40", "--html", "/no/such/folder/page.html"), ["--html='/no/such/folder/page.html'"]),
        (("explain", "/no/such/plan.json"), ["/no/such/plan.json", "--save"]),
    ],
)
def test_wrong_input_is_one_line_and_ends_with_2_with_json_too(run, arguments, words):
    status, out, err = run(*arguments)
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("overflowml: ")
    assert all(word in lines[0] for word in words)
    status, out, err = run(*arguments, "--json")
    answer = json.loads(out)
    assert (status, answer["exit_code"], err) == (2, 2, "")
    assert all(word in answer["error"] for word in words)


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("plan",), ("plan", "x", "--batch", "two"), ("plan", "x", "--nonsense"), ("plan", "120", "--moe", "120", "12")],
)
def test_an_unknown_word_ends_with_2_and_no_traceback(run, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (2, "")
    assert json.loads(out)["exit_code"] == 2


def test_output_that_is_closed_ends_with_141_and_no_complaint():
    reading, writing = os.pipe()
    os.close(reading)
    done = in_a_process("can-run", "40", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = in_a_process("--version", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("overflowml: the output cannot be written")
    assert "Traceback" not in done.stderr


def test_no_torch_for_a_bare_size():
    code = "import sys; from overflowml_core.cli.app import app; app(['plan', '40', '--compare'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "plugins")))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr


class Greeter:
    @hookimpl
    def overflowml_register_commands(self, app):
        if any(command.name == "greet" for command in app.registered_commands):
            return

        @app.command("greet")
        def greet(name: str) -> None:
            print(f"hello {name}")  # noqa: T201 -- the command's answer


def test_a_plugin_adds_a_command(run, monkeypatch):
    registered = list(app.app.registered_commands)
    plugins = Plugins({"greeter": Greeter()}, load_entry_points=False)
    monkeypatch.setattr(session, "plugins", lambda: plugins)
    assert run("greet", "you") == (0, "hello you\n", "")
    assert "greet" in run("--help")[1]
    app.app.registered_commands[:] = registered


def test_plugins_are_not_asked_for_commands_of_ours(run, monkeypatch):
    monkeypatch.setattr(session, "plugins", lambda: pytest.fail("plugins were loaded"))
    assert run("--version")[0] == 0
    assert run("explain", "/no/such/plan.json")[0] == 2
