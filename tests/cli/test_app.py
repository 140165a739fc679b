"""The command line as a user meets it: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from overflowml import __version__
from overflowml_core.cli import app
from overflowml_core.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command line and gives its exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["overflowml", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_version(run):
    assert run("--version") == (0, f"overflowml {__version__}\n", "")


def test_detect(run):
    status, out, _ = run("detect", "--json")
    assert status == 0
    assert json.loads(out)["host"]["core_count"] >= 1
    assert "RAM" in run("detect")[1]


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
    suggested = err.partition("overflow='")[2].partition("'")[0]
    assert run("plan", folder, "--vram", suggested, "--reserve", "100KB")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "/no/such/folder"), ["/no/such/folder", "does not exist"]),
        (("plan", "{folder}", "--vram", "lots"), ["--vram='lots'", "8GB"]),
        (("plan", "{folder}", "--vram", "-1"), ["--vram='-1'"]),
        (("plan", "{folder}", "--ram", "0"), ["--ram='0'"]),
        (("plan", "{folder}", "--batch", "0"), ["batch=0"]),
    ],
)
def test_wrong_input_is_one_line_and_ends_with_2(run, folder, arguments, words):
    status, out, err = run(*(str(argument).format(folder=folder) for argument in arguments))
    lines = [line for line in err.splitlines() if line.startswith("overflowml: ")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert all(word in lines[0] for word in words)


@pytest.mark.parametrize("arguments", [("nonsense",), ("plan",), ("plan", "x", "--dtype", "float17"), ("plan", "x", "--batch", "two")])
def test_an_unknown_word_ends_with_2_and_no_traceback(arguments):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'plugins')!r}]; sys.argv = {['overflowml', *arguments]!r}\n"
    code += "from overflowml_core.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
