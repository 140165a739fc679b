"""The bar of a load: bytes on a terminal's standard error, and nothing anywhere else."""

from __future__ import annotations

import io
import sys

import pytest

from overflowml_core.progress import loading_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest puts its own standard error in place after the fixtures."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return shown


def load(wanted: bool = True) -> None:
    with loading_bar(wanted) as tell:
        for done in (0, 500_000_000, 2_000_000_000):
            tell(done, 2_000_000_000)


def test_a_terminal_sees_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    load()
    shown = terminal.getvalue()
    assert "Bringing in weights" in shown
    assert "2.0/2.0 GB" in shown


def test_a_load_that_fails_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with pytest.raises(MemoryError), loading_bar():
        raise MemoryError
    before = terminal.getvalue()
    load()
    assert len(terminal.getvalue()) > len(before)  # rich allows one live display at a time; this one is over


def test_no_bar_where_the_host_shows_none_or_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    load(wanted=False)
    monkeypatch.setenv("OVERFLOWML_PROGRESS", "0")
    load()
    assert terminal.getvalue() == ""


def test_no_bar_where_standard_error_is_no_terminal_or_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    load()
    assert shown.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    load()
