"""docs/cli.md says what the command line does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from overflowml_core.cli import app, ending, words
from overflowml_core.cli.options import Request

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def test_every_command_is_on_the_page():
    named = set(re.findall(r"`([a-z-]+)(?= |`)", PAGE))
    assert {command.name for command in app.app.registered_commands} <= named


@pytest.mark.parametrize("option", [f"--{field.name.replace('_', '-')}" for field in fields(Request) if field.name != "source"])
def test_every_option_is_on_the_page(option):
    assert re.search(rf"{option}\b", PAGE)


def test_every_status_is_on_the_page_and_in_the_help():
    statuses = [value for name, value in vars(ending).items() if name.isupper() and isinstance(value, int)]
    assert len(statuses) == 6
    assert all(re.search(rf"^\| {status} \|", PAGE, re.M) and f"{status} " in ending.EPILOG for status in statuses)


def test_the_rule_of_the_speed_words_is_on_the_page():
    assert f"`fast` up to {words.FAST:g}, `medium` up to {words.MEDIUM:g}, `slow` up to {words.SLOW:g}, `slowest` beyond" in PAGE
    assert all(f"| `{kind}` |" in PAGE for kind in words.STRATEGIES)
    assert all(f"`{risk}`" in PAGE for risk in words.RISKS.values())
