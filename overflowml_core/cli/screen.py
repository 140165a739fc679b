"""Prints to a terminal as wide as it is, in colours, and plainly into a pipe or a file. Decides nothing of what is said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_PLAIN_WIDTH = 100
"""Columns of paragraphs where the output is no terminal; tables are as wide as they need to be there."""
_NARROWEST = 20
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, whether its cells are figures and stand to the right, and a style by rich's names."""

    heading: str
    figures: bool = False
    style: str = ""


def printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor or cannot be written; names come from files of strangers."""
    return "".join(c if c.isprintable() else "?" for c in text)


def wrapped(text: str, width: int, indent: str = "", hanging: str = "") -> list[str]:
    """The text in lines, as ``textwrap`` makes them, but by the columns that characters take: many of East Asia take two.

    Args:
        text: to be cut at spaces; words that fill more than a line are cut anywhere.
        width: columns of a line.
        indent: before each line.
        hanging: behind it, before each line but the first.
    """
    lines: list[str] = []
    line, room = "", width - cell_len(indent)

    def end() -> None:
        nonlocal line, room
        if line.rstrip():
            lines.append(f"{indent}{hanging if lines else ''}{line.rstrip()}")
            room = width - cell_len(indent + hanging)
        line = ""

    for word in re.findall(" +|[^ ]+", text):
        while cell_len(line + word) > room:
            fits = _fitting(word, room - cell_len(line)) if cell_len(word) > room else 0
            if not fits and not line:
                fits = 1  # a character that is wider than a line
            line, word = line + word[:fits], word[fits:].lstrip()
            end()
        line += word
    end()
    return lines


def _fitting(word: str, room: int) -> int:
    """How many of its characters fit into so many columns."""
    count = 0
    while count < len(word) and cell_len(word[: count + 1]) <= room:
        count += 1
    return count


class Screen:
    """Where a command prints.

    Args:
        stderr: print to standard error.
    """

    def __init__(self, stderr: bool = False) -> None:
        self._console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether a person looks on."""
        return self._console.is_terminal

    @property
    def width(self) -> int:
        """Columns that paragraphs may take."""
        return max(_NARROWEST, self._console.width) if self.is_terminal else _PLAIN_WIDTH

    def text(self, line: str = "", style: str = "") -> None:
        """Print a line as it is; a terminal folds what is too long."""
        self._console.print(Text(printable(line), style=style))

    def heading(self, title: str) -> None:
        """Print the title of a section."""
        self.text(f"=== {title} ===", "bold")

    def paragraph(self, text: str, indent: str = "", hanging: str = "", style: str = "") -> None:
        """Print a text in lines of at most ``width``, the first one behind ``indent`` and the others behind ``hanging`` more."""
        for line in wrapped(printable(text), self.width, indent, hanging):
            self._console.print(Text(line, style=style))

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], marks: Sequence[str] = (), indent: str = "") -> None:
        """Print a table; where the terminal is too narrow for it, each row as a list of "heading: cell".

        Args:
            columns: headings and alignment.
            rows: as many cells as columns, each.
            marks: what stands behind each row.
            indent: before each line.
        """
        cells = [[printable(cell) for cell in row] for row in rows]
        notes = [printable(mark) for mark in marks] or [""] * len(cells)
        widths = [max(cell_len(cell) for cell in (column.heading, *(row[i] for row in cells))) for i, column in enumerate(columns)]
        if self.is_terminal and len(indent) + sum(widths) + len(_GAP) * (len(columns) - 1) > self.width:
            self._stacked(columns, cells, notes, indent)
            return
        wide = self.width if self.is_terminal else 10**6
        self._console.print(Text(indent) + _joined(columns, [c.heading for c in columns], widths, heading=True))
        for row, note in zip(cells, notes, strict=True):
            line = Text(indent) + _joined(columns, row, widths)
            if note and line.cell_len + len(_GAP) + cell_len(note) <= wide:
                line.append(_GAP + note, "bold green" if note.startswith("<-") else "dim")
                note = ""
            line.rstrip()
            self._console.print(line)
            if note:
                self.paragraph(note, f"{indent}     ", style="bold green" if note.startswith("<-") else "dim")

    def _stacked(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], notes: Sequence[str], indent: str) -> None:
        for row, note in zip(rows, notes, strict=True):
            pairs = [(column, cell) for column, cell in zip(columns, row, strict=True) if cell]
            # A row is titled by its number and by what stands out in the table, or by its first cell.
            titles = [(c, cell) for c, cell in pairs if c.heading == "#" or c.style] or pairs[:1]
            title = " ".join(f"#{cell}" if column.heading == "#" else cell for column, cell in titles)
            self.paragraph(f"{title} {note}".rstrip(), indent, "  ", "bold")
            for column, cell in pairs:
                if (column, cell) not in titles:
                    self.paragraph(f"{column.heading}: {cell}", f"{indent}  ", "  ")


def _joined(columns: Sequence[Column], cells: Sequence[str], widths: Sequence[int], heading: bool = False) -> Text:
    line = Text()
    for i, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
        filling = " " * (width - cell_len(cell))
        line.append(_GAP if i else "")
        line.append(filling if column.figures else "")
        line.append(cell, "bold" if heading else column.style)
        line.append("" if column.figures else filling)
    if heading:
        line.rstrip()
    return line
