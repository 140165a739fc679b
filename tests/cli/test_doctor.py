"""doctor: each check on facts that make it pass, warn and fail; its text, its JSON, its exit status; no torch and no network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from overflowml_core.cli import doctor as command
from overflowml_core.doctor import Facts, Report, examine, gather
from overflowml_core.inspect.driver import DriverDevice, Link
from overflowml_core.inspect.torch_build import TorchBuild
from overflowml_core.machine import Accelerator, HostMemory, Machine, Rates

ROOT = Path(__file__).parents[2]
GIB = 2**30
_VERSIONS = {
    "overflowml": "0.1.0",
    "torch": "2.13.0+cu128",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "torchao": "0.18.0",
}
_LINK = Link(generation=4, lanes=16, current_generation=4, most_lanes=16)
_CARD = DriverDevice("cuda", "cuda", "NVIDIA RTX 4090", 24 * GIB, 23 * GIB, capability="8.9", driver="575.51.03", link=_LINK)


def _machine(**changes) -> Machine:
    card = Accelerator("cuda", _CARD.name, 0, _CARD.total_bytes, _CARD.free_bytes, backend="cuda")
    host = HostMemory(64 * GIB, 60 * GIB, 32 * GIB, 16, swap_bytes=8 * GIB)
    made = Machine((card,), host, Rates(25e9, 25e9, 5e9, "measured"), 500 * GIB, frozenset({"linux"}))
    return replace(made, **changes)


def _facts(**changes) -> Facts:
    """An environment in which nothing is wrong."""
    made = Facts(
        python="3.12.4",
        versions=_VERSIONS,
        torch=TorchBuild("2.13.0+cu128", cuda="12.8", known=True),
        devices=(_CARD,),
        machine=_machine(),
        ram_bytes=64 * GIB,
        cache_folder=Path("/home/me/.cache/overflowml"),
        cache_file_system="ext4",
        plugins=("builtin", "diffusers"),
        architecture="x86_64",
    )
    return replace(made, **changes)


def _levels(facts: Facts) -> dict[str, str]:
    return {f"{check.name}": check.level for check in examine(facts).checks if check.level != "PASS"}


def _without(*names: str) -> dict[str, str]:
    return {name: version for name, version in _VERSIONS.items() if name not in names}


def _card(**changes) -> Facts:
    return _facts(devices=(replace(_CARD, **changes),))


def test_nothing_is_wrong_with_a_good_environment():
    report = examine(_facts())
    assert [check for check in report.checks if check.level != "PASS"] == []
    assert report.ok
    assert [check for check in report.checks if check.fix] == []


CPU_TORCH = TorchBuild("2.13.0+cpu", known=True)
ROCM_TORCH = TorchBuild("2.13.0+rocm6.4", hip="6.4", known=True)
_HOST = _machine().host

CASES = {
    "old python": (_facts(python="3.9.18"), {"python": "FAIL"}, "install Python 3.10"),
    "no torch": (_facts(torch=None), {"torch": "FAIL"}, 'pip install "overflowml[diffusers]"'),
    "old torch": (
        _facts(torch=TorchBuild("2.4.1+cu121", cuda="12.1", known=True)),
        {"torch": "FAIL"},
        'pip install --upgrade "torch>=2.6"',
    ),
    "new torch": (_facts(torch=TorchBuild("2.14.0+cu128", cuda="12.8", known=True)), {"torch": "WARN"}, 'pip install "torch==2.13.*"'),
    "torch for the CPU beside a card": (_facts(torch=CPU_TORCH), {"torch-build": "FAIL"}, "--force-reinstall torch"),
    "torch for another vendor": (_facts(torch=ROCM_TORCH), {"torch-build": "FAIL"}, "--force-reinstall torch"),
    "old driver": (_card(driver="470.82.01"), {"torch-driver": "FAIL"}, "NVIDIA driver 525.60 or newer"),
    "old driver for CUDA 13": (
        _facts(torch=TorchBuild("2.13.0+cu130", cuda="13.0", known=True)),
        {"torch-driver": "FAIL"},
        "NVIDIA driver 580 or newer",
    ),
    "card newer than torch": (
        replace(_card(name="RTX 5090", capability="12.0"), torch=TorchBuild("2.6.0+cu124", cuda="12.4", known=True)),
        {"torch-device": "FAIL"},
        "--force-reinstall torch",
    ),
    "card older than torch": (
        replace(_card(name="GTX 1080", capability="6.1", driver="580.65"), torch=TorchBuild("2.13.0+cu130", cuda="13.0", known=True)),
        {"torch-device": "FAIL"},
        "for CUDA 12",
    ),
    "torch cannot open the card": (_facts(machine=_machine(accelerators=())), {"device": "FAIL"}, "torch.zeros(1, device='cuda')"),
    "others hold the memory": (
        _facts(machine=_machine(accelerators=(replace(_machine().accelerators[0], free_bytes=3 * GIB),))),
        {"device": "WARN"},
        "nvidia-smi",
    ),
    "four lanes of sixteen": (_card(link=replace(_LINK, lanes=4)), {"link": "WARN"}, "slot"),
    "no host": (_facts(versions=_without("diffusers", "transformers")), {"hosts": "WARN"}, "overflowml[diffusers]"),
    "old host": (_facts(versions={**_VERSIONS, "transformers": "4.57.1"}), {"transformers": "FAIL"}, '"transformers>=5.17"'),
    "new host": (_facts(versions={**_VERSIONS, "diffusers": "0.50.0"}), {"diffusers": "WARN"}, "diffusers==0.42.*"),
    "no accelerate": (_facts(versions=_without("accelerate")), {"accelerate": "FAIL"}, "pip install"),
    "no safetensors": (_facts(versions=_without("safetensors")), {"safetensors": "FAIL"}, "pip install safetensors"),
    "no torchao": (_facts(versions=_without("torchao")), {"torchao": "WARN"}, 'pip install "overflowml[quantize]"'),
    "no hub": (_facts(versions=_without("huggingface_hub")), {"hub": "WARN"}, "pip install huggingface_hub"),
    "offline": (_facts(variables={"HF_HUB_OFFLINE": "1"}), {"hub": "WARN"}, "unset HF_HUB_OFFLINE"),
    "little RAM": (_facts(machine=_machine(host=replace(_HOST, available_bytes=GIB))), {"ram": "WARN"}, "end other programs"),
    "limit of a container": (
        _facts(machine=_machine(host=replace(_HOST, total_bytes=8 * GIB), environment=frozenset({"linux", "container"}))),
        {"memory-limit": "WARN"},
        "--memory",
    ),
    "limit of a group": (_facts(machine=_machine(host=replace(_HOST, total_bytes=8 * GIB))), {"memory-limit": "WARN"}, "MemoryMax="),
    "little RAM in WSL2": (
        _facts(machine=_machine(environment=frozenset({"linux", "wsl2"}), host=replace(_HOST, total_bytes=16 * GIB)), ram_bytes=16 * GIB),
        {"wsl2-memory": "WARN", "wsl2-pinning": "WARN"},
        ".wslconfig",
    ),
    "cache folder is read-only": (_facts(cache_problem="/home/me: Permission denied"), {"cache-folder": "FAIL"}, "OVERFLOWML_CACHE=FOLDER"),
    "small disk": (_facts(machine=_machine(disk_free_bytes=GIB)), {"disk": "WARN"}, "OVERFLOWML_CACHE=FOLDER"),
    "cache in memory": (_facts(cache_file_system="tmpfs"), {"cache-in-memory": "WARN"}, "OVERFLOWML_CACHE=FOLDER"),
    "never measured": (_facts(machine=_machine(rates=Rates(1, 1, 1))), {"calibration": "WARN"}, "overflowml calibrate"),
    "measured with another driver": (
        _facts(machine=_machine(rates=Rates(1, 1, 1)), other_calibrations=1),
        {"calibration": "WARN"},
        "overflowml calibrate",
    ),
    "unreadable size": (_facts(variables={"OVERFLOWML_HOST_MEMORY": "lots"}), {"variable": "FAIL"}, "unset OVERFLOWML_HOST_MEMORY"),
    "misspelt variable": (_facts(variables={"OVERFLOWML_CASH": "/x"}), {"variable": "WARN"}, "OVERFLOWML_CACHE is meant"),
    "switched off": (_facts(variables={"OVERFLOWML_DISABLE": "1"}), {"variable": "WARN"}, "unset OVERFLOWML_DISABLE"),
    "expandable segments": (
        _facts(
            machine=_machine(environment=frozenset({"windows", "wddm"})), variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        ),
        {"expandable-segments-on-wddm": "WARN"},
        "set PYTORCH_CUDA_ALLOC_CONF=",
    ),
    "broken plugin": (_facts(faults={"mine": "ImportError: no\nluck"}), {"plugin": "FAIL"}, "OVERFLOWML_DISABLE_PLUGINS=mine"),
    "activated by another version": (_facts(activation="stale"), {"activation": "WARN"}, "overflowml activate"),
}


@pytest.mark.parametrize("name", CASES)
def test_names_what_is_wrong_and_what_helps(name):
    facts, levels, fix = CASES[name]
    assert _levels(facts) == levels
    wrong = [check for check in examine(facts).checks if check.level != "PASS"]
    assert any(fix in check.fix for check in wrong)
    assert all(check.fix and "\n" not in check.text + check.fix for check in wrong)
    assert examine(facts).ok == ("FAIL" not in levels.values())


GOOD = {
    "newest driver, oldest CUDA": _card(driver="610.10"),
    "idle link": _card(link=replace(_LINK, current_generation=1)),
    "no card, torch for the CPU": _facts(torch=CPU_TORCH, devices=(), machine=_machine(accelerators=())),
    "an integrated card of another vendor": _facts(devices=(_CARD, DriverDevice("xpu", "xpu", "Intel UHD", GIB, GIB, unified=True))),
    "a build that nobody knows": _facts(torch=TorchBuild()),
    "a driver that tells no version": _card(driver="", capability=""),
    "activated": _facts(activation="active"),
    "sizes that can be read": _facts(
        variables={"OVERFLOWML_DEVICE_MEMORY": "8GB", "OVERFLOWML_RESERVE": "", "OVERFLOWML_CACHE_SIZE": "0", "OVERFLOWML_DISABLE": "0"}
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_finds_nothing_wrong_where_nothing_is(name):
    assert _levels(GOOD[name]) == {}


def test_an_idle_link_is_said_to_be_normal():
    texts = [check.text for check in examine(GOOD["idle link"]).checks if check.name == "link"]
    assert texts == ["NVIDIA RTX 4090: PCIe 4.0 x16; it runs at generation 1 now, which is normal while it idles"]


def test_no_fix_names_a_registry():
    for facts, _, _ in CASES.values():
        for check in examine(facts).checks:
            assert not re.search(r"https?://|--index-url|\.org|\.co\b", check.fix)


def _run(report: Report, monkeypatch, *arguments: str):
    app = typer.Typer()
    app.command()(command.doctor)
    monkeypatch.setattr(command, "_examine", lambda: report)
    return CliRunner().invoke(app, [*arguments])


def test_text_has_the_three_words_and_their_fixes(monkeypatch):
    done = _run(examine(_facts(torch=CPU_TORCH, versions=_without("torchao"))), monkeypatch)
    lines = done.output.splitlines()
    assert lines[0] == "=== OverflowML Doctor ==="
    assert {"Environment", "Hardware", "Checks", "  Python: 3.12.4", "  GPU: NVIDIA RTX 4090 (24.00 GiB, compute capability 8.9)"} <= set(
        lines
    )
    assert "  [PASS] diffusers 0.42.1" in lines
    where = lines.index("  [WARN] torchao is not installed: no FP8, INT8 or INT4 weights")
    assert lines[where + 1] == '         Fix: pip install "overflowml[quantize]"'
    assert any(line.startswith("  [FAIL] NVIDIA RTX 4090 is there") for line in lines)
    assert "\x1b" not in done.output
    assert done.exit_code == 1


@pytest.mark.parametrize(("facts", "status"), [(_facts(), 0), (_facts(versions=_without("torchao")), 0), (_facts(torch=None), 1)])
def test_exit_status_is_1_only_where_something_failed(facts, status, monkeypatch):
    for arguments in ((), ("--json",)):
        assert _run(examine(facts), monkeypatch, *arguments).exit_code == status


def test_json_is_the_whole_report_and_nothing_else(monkeypatch):
    done = _run(examine(_facts(torch=None)), monkeypatch, "--json")
    document = json.loads(done.output)
    assert document["ok"] is False
    assert document["environment"]["Python"] == "3.12.4"
    assert document["hardware"]["System RAM"] == "64.00 GiB"
    assert {"name": "python", "level": "PASS", "text": "Python 3.12.4", "fix": ""} in document["checks"]


# ---- facts of a real process


@pytest.fixture
def machine() -> Machine:
    return _machine(rates=Rates(1, 1, 1))


def test_facts_of_this_process(machine, tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "old.json").write_text("{}")
    facts = gather(machine, tmp_path, {"A": "b"}, ("builtin",), {"x": "y"})
    assert facts.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert facts.versions["psutil"]
    assert (facts.cache_problem, facts.other_calibrations) == ("", 1)
    assert (facts.variables, facts.plugins, facts.faults) == ({"A": "b"}, ("builtin",), {"x": "y"})
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]
    assert examine(facts).checks


@pytest.mark.parametrize("below", ["", "not/there/yet"])
def test_a_cache_folder_that_does_not_exist_is_judged_by_its_parent(machine, tmp_path, below):
    facts = gather(machine, tmp_path / below, {})
    assert facts.cache_problem == ""
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_is_a_file_is_a_problem(machine, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert gather(machine, path / "cache", {}).cache_problem == f"{path} is no folder"


def test_doctor_brings_in_no_torch_where_no_device_asks_for_it(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "plugins")!r}]
import overflowml_core.inspect.accelerators as accelerators
accelerators.torch_may_have_devices = lambda root=None: False
import typer
from overflowml_core.cli.doctor import doctor
app = typer.Typer()
app.command()(doctor)
try: app(["--json"])
except SystemExit as done: print(done.code, file=sys.stderr)
print([m for m in ("torch", "transformers", "diffusers", "torchao") if m in sys.modules], file=sys.stderr)
"""
    environment = {"OVERFLOWML_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    assert json.loads(done.stdout)["checks"]
