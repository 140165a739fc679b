"""Arrows go down only, imports stay light, files stay small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'plugins')!r}]\n"
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=120, check=False)


def test_import_contracts_are_kept():
    pytest.importorskip("importlinter")
    from importlinter.cli import lint_imports

    code = f"import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'plugins')!r}]; os.chdir({str(ROOT)!r})\n"
    code += f"from {lint_imports.__module__} import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", ["overflowml_core", "overflowml_core.planner", "overflowml_core.inspect", "overflowml"])
def test_import_brings_in_no_torch_and_no_host(package):
    heavy = "torch", "transformers", "diffusers", "accelerate", "numpy", "safetensors"
    done = _python(f"import {package}; print([m for m in {heavy!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_version_command_brings_in_no_torch():
    code = "sys.argv = ['overflowml', '--version']\nfrom overflowml_core.cli import main\n"
    done = _python(code + "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)")
    assert done.stdout.split()[0] == "overflowml", done.stderr
    assert done.stdout.split()[-1] == "False"


def test_no_file_is_over_400_lines():
    files = [
        p
        for folder in ("overflowml", "overflowml_core", "plugins", "comfyui_nodes", "benchmarks", "tests")
        for p in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_without_torch_a_folder_is_an_error_that_names_the_extra(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    hide = "import importlib.util as u; real = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name.split('.')[0] in ('torch', 'transformers') else real(name, *a)\n"
    plan = "import overflowml_core.session as s, overflowml_transformers as t\n"
    plan += "'transformers' in s.plugins().names() or s.plugins().register(t, 'transformers')\n"
    plan += f"import overflowml\ntry: overflowml.plan({str(tmp_path)!r})\nexcept overflowml.OverflowmlError as e: print(e)"
    done = _python(hide + plan)
    assert "pip install 'overflowml[transformers]'" in done.stdout, done.stderr
