"""What the bar of pictures tells where standard error is no terminal, and in one."""

from __future__ import annotations

import pytest

from overflowml_core.cli.running.bar import pictures_bar
from overflowml_core.runtime.events import Events


def test_lines_tell_what_happened_when_memory_ran_out(capsys: pytest.CaptureFixture[str]) -> None:
    events = Events()
    with pictures_bar() as tell:
        tell(1, 3, events.counted())
        for kind in ("demoted", "retried", "demoted"):
            events.add(kind, "memory ran out")
        tell(2, 3, events.counted())
    assert capsys.readouterr().err.splitlines() == [
        "overflowml: 1 of 3 pictures",
        "overflowml: 2 of 3 pictures (2 demoted, 1 retried)",
    ]


def test_the_bar_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with pictures_bar() as tell:
        tell(2, 3, "1 demoted")
    assert "Pictures (1 demoted)" in capsys.readouterr().err
