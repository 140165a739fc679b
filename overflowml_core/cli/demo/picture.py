"""Memory over time of a direct and a managed run, as a picture. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overflowml_core.cli.demo.results import Comparison, Measured

_MIB = 2**20
_DIRECT_COLOUR, _MANAGED_COLOUR, _BUDGET_COLOUR = "#c0504d", "#1f6fb4", "#333333"


def draw_memory(comparison: Comparison, path: Path) -> None:
    """Write a PNG: seconds across, MiB upwards, both runs and the budget.

    On an accelerator the lines are its allocator's bytes. On a CPU they are the resident memory of the process above its
    baseline; dotted the part that is its own (a plain load maps the weight files instead of copying them); and what
    overflowml's engine held.

    Args:
        comparison: the two runs.
        path: of the picture.
    """
    # The object interface: no global state, no display, whatever backend the user has configured.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_run(axes, comparison.direct, "direct", _DIRECT_COLOUR)
    _draw_run(axes, comparison.managed, "overflowml", _MANAGED_COLOUR)
    axes.axhline(
        comparison.budget_bytes / _MIB, color=_BUDGET_COLOUR, linestyle="--", label=f"budget, {comparison.budget_bytes / _MIB:.0f} MiB"
    )
    axes.axhline(
        comparison.weights_bytes / _MIB, color="#999999", linestyle=":", label=f"weights, {comparison.weights_bytes / _MIB:.0f} MiB"
    )
    axes.set(title=comparison.title, xlabel="seconds (loading and running, without imports)", ylabel="MiB", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize="small", framealpha=0.9)
    figure.savefig(path)


def _draw_run(axes: Any, run: Measured, label: str, colour: str) -> None:
    seconds = [s.second for s in run.samples]
    if run.device != "cpu":
        axes.plot(seconds, [s.device_bytes / _MIB for s in run.samples], color=colour, label=f"{label}: allocated on {run.device}")
        return
    resident = [(s.anonymous_bytes + s.mapped_bytes) / _MIB for s in run.samples]
    axes.plot(seconds, resident, color=colour, label=f"{label}: resident, with mapped files")
    anonymous = [s.anonymous_bytes / _MIB for s in run.samples]
    axes.plot(seconds, anonymous, color=colour, linestyle=":", label=f"{label}: anonymous part")
    engine = [(s.second, s.engine_bytes / _MIB) for s in run.samples if s.engine_bytes]
    if engine:
        axes.plot(*zip(*engine, strict=True), color="#2e8b57", label=f"{label}: held by the engine, highest so far")
