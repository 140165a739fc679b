"""The demo as users run it: real weights, real classes, real processes."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
from rich.console import Console

from overflowml_core.cli.demo import run_demo
from overflowml_core.cli.demo.cases import CASES


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("info", CASES, ids=lambda info: info.name)
def test_demo_is_identical_and_within_budget(info, tmp_path):
    for package, _ in info.packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    text = io.StringIO()
    code = run_demo(tmp_path / "demo", only=info.name, console=Console(file=text, width=160))
    assert code == 0, text.getvalue()
    (entry,) = json.loads((tmp_path / "demo" / "summary.json").read_text())["runs"]
    assert entry["identical"]
    assert 0 < entry["measured_peak_bytes"] <= entry["budget_bytes"] == entry["weights_bytes"] // 3
    assert (tmp_path / "demo" / f"{info.name}-memory.png").stat().st_size > 1000
    if info.name == "smollm2":
        assert "Paris" in entry["output"]
    else:
        assert (tmp_path / "demo" / "flux.png").stat().st_size > 1000
