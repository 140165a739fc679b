"""The pack's entry in an interpreter without the host, and without the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PACK = Path(__file__).parents[2] / "comfyui_nodes"
_LOAD = """
import importlib.util, sys
sys.path[:] = [p for p in sys.path if "plugins" not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
spec = importlib.util.spec_from_file_location("pack", {init!r}, submodule_search_locations=[{folder!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
print(module.NODE_CLASS_MAPPINGS)
"""


def test_without_the_package_it_adds_no_nodes_and_says_in_one_line_what_to_install(tmp_path):
    script = _LOAD.format(init=str(_PACK / "__init__.py"), folder=str(_PACK))
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)

    assert done.stdout.strip() == "{}"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "pip install overflowml" in lines[0]


def test_every_node_that_is_drawn_has_its_help():
    helped = {path.stem for path in (_PACK / "web" / "docs").glob("*.md")}
    named = {line.split('"')[1] for file in _PACK.glob("*.py") for line in file.read_text().splitlines() if 'node_id="' in line}

    assert helped == named
    assert len(named) == 6
