"""A comparison as a table for the terminal. Needs rich, knows nothing of how the runs were made."""

from __future__ import annotations

from rich.table import Table

from overflowml_core.cli.demo.results import Comparison
from overflowml_core.units import format_bytes, format_seconds

_CPU_CAPTION = "measured peak: what the engine held, without activations; the growth of the process has both"


def comparison_table(comparison: Comparison) -> Table:
    """Direct and managed side by side."""
    direct, managed = comparison.direct, comparison.managed
    table = Table(caption=_CPU_CAPTION if managed.device == "cpu" else None, caption_justify="left")
    table.add_column(f"{format_bytes(comparison.weights_bytes)} of weights on {managed.device}")
    table.add_column("direct", justify="right")
    table.add_column("overflowml", justify="right")
    table.add_row("load", format_seconds(direct.load_s), format_seconds(managed.load_s))
    table.add_row("run", format_seconds(direct.run_s), format_seconds(managed.run_s))
    table.add_row("budget", "", format_bytes(comparison.budget_bytes))
    table.add_row("predicted peak", "", _size(managed.predicted_peak_bytes))
    table.add_row("measured peak", _size(direct.device_peak_bytes), _size(managed.device_peak_bytes))
    if managed.device == "cpu":
        limit = comparison.anonymous_limit_bytes
        table.add_row("process grew by", format_bytes(direct.anonymous_growth_bytes), format_bytes(managed.anonymous_growth_bytes))
        table.add_row("  limit", "", _size(limit))
        table.add_row("  with mapped files", format_bytes(direct.resident_growth_bytes), format_bytes(managed.resident_growth_bytes))
    table.add_row("identical", "", "[green]yes[/]" if comparison.identical else "[red]no[/]")
    return table


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else format_bytes(nbytes)
