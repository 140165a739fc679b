"""What is printed fits the terminal, and is plain where there is none."""

from __future__ import annotations

import io
from textwrap import wrap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from overflowml_core.cli.screen import Column, Screen, printable, wrapped

COLUMNS = (Column("#", figures=True), Column("Name", style="bold"), Column("Size", figures=True))
ROWS = (("1", "first", "10.0 GiB"), ("2", "a longer name", "9 B"))


def screen_of(width: int | None = None, **options) -> tuple[Screen, io.StringIO]:
    stream = io.StringIO()
    screen = Screen()
    terminal = {"force_terminal": True, "width": width, "color_system": "standard"} if width else {}
    screen._console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True, **terminal, **options)
    return screen, stream


def test_piped_tables_are_plain_and_aligned():
    screen, stream = screen_of()
    screen.table(COLUMNS, ROWS, ["<- this", ""])
    assert stream.getvalue().splitlines() == [
        "#  Name               Size",
        "1  first          10.0 GiB  <- this",
        "2  a longer name       9 B",
    ]


def test_piped_tables_are_never_folded(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen, stream = screen_of()
    screen.table(COLUMNS, (("1", "x" * 300, "2"),), ["y" * 300])
    assert len(stream.getvalue().splitlines()) == 2


def test_a_table_that_is_too_wide_becomes_a_list():
    screen, stream = screen_of(24, no_color=True)
    screen.table(COLUMNS, ROWS, ["<- this", ""])
    text = stream.getvalue()
    assert "#1 first <- this" in text
    assert "Size: 10.0 GiB" in text
    assert "Name" not in text


@given(width=st.integers(20, 120), cells=st.lists(st.text(max_size=60), min_size=3, max_size=3), mark=st.text(max_size=30))
@example(width=35, cells=["0000000000000000000000⺀", "", ""], mark="0000000000")
def test_no_line_of_a_table_is_wider_than_the_terminal(width, cells, mark):
    screen, stream = screen_of(width, no_color=True)
    screen.table(COLUMNS, (cells,), [mark])
    for line in stream.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[2m", "").splitlines():
        assert cell_len(line) <= max(width, 20)


@given(st.text("ab -", max_size=60).map(str.lstrip), st.integers(4, 30), st.sampled_from(["", "  "]), st.sampled_from(["", " "]))
def test_narrow_characters_are_wrapped_as_textwrap_does(text, width, indent, hanging):
    lines = wrap(text, width, initial_indent=indent, subsequent_indent=indent + hanging, break_on_hyphens=False)
    assert wrapped(text, width, indent, hanging) == [line.rstrip() for line in lines]


@given(st.text("a⺀画\u0301 ", max_size=60), st.integers(20, 40))
def test_wide_characters_are_wrapped_by_columns_and_none_is_lost(text, width):
    lines = wrapped(text, width, "  ", "  ")
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_colours_on_a_terminal_and_none_with_no_color(monkeypatch):
    screen, stream = screen_of(80)
    screen.table(COLUMNS, ROWS, ["<- this", ""])
    assert "\x1b[1;32m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    screen, stream = screen_of(80)
    screen.table(COLUMNS, ROWS, ["<- this", ""])
    assert "32m" not in stream.getvalue()


@pytest.mark.parametrize("text", ["\x1b[2Jcleared", "line\nline", "\udc80", "\u202eleft", "\x00"])
def test_nothing_of_a_strangers_name_moves_the_cursor(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    shown.encode()


def test_markup_of_rich_is_no_markup_here():
    screen, stream = screen_of()
    screen.text("[bold]name[/bold] :smile:")
    screen.paragraph("[red]name")
    assert stream.getvalue() == "[bold]name[/bold] :smile:\n[red]name\n"
