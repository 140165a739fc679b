"""The picture of expert heat in a terminal: one character for one or several experts, in colours where there are any."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from overflowml_core.cli.heat.picture import LEVEL_WORDS, LEVELS, Row, grouped, level_of
from overflowml_core.cli.screen import Screen, printable

_SHADES = "·░▒▓█"
_CIRCLES = "○◔◑◕●"
"""What is cached, where no colour can tell it."""
_PLAIN_SHADES, _PLAIN_CIRCLES = ".-+x#", "01234"
"""The same where the output has no such characters."""
_CACHED, _OUTSIDE = "bold green", "yellow"
_STEPS = (1, 3, 4, 6)
"""Where a new shade begins, among the levels."""
_LEAST_COLUMNS = 16


class HeatScreen(Screen):
    """A screen that knows how to draw a row of heat."""

    def picture(self, rows: Sequence[Row]) -> None:
        """Print the picture with a legend below it."""
        if not rows:
            return
        colours = self._console.color_system is not None and not self._console.no_color
        shades, marks = (_SHADES, _CIRCLES) if self._can_write(_SHADES + _CIRCLES) else (_PLAIN_SHADES, _PLAIN_CIRCLES)
        marks = shades if colours else marks
        labels = [printable(row.label) for row in rows]
        label_columns = min(max(cell_len(label) for label in labels), self.width // 3)
        columns = max(_LEAST_COLUMNS, self.width - label_columns - len("  hits 100 %") - 1)
        most = max(len(row.ratios) for row in rows)
        size = -(-most // columns)
        for row, label in zip(rows, labels, strict=True):
            cells = grouped(row, -(-len(row.ratios) // size))
            line = Text(label[-label_columns:].rjust(label_columns) + " ")
            for ratio, cached in cells:
                held = cached >= 0.5
                line.append((marks if held else shades)[_shade(ratio)], (_CACHED if held else _OUTSIDE) if colours else "")
            line.append(" " * (-(-most // size) - len(cells)))
            line.append("" if row.hit_rate is None else f"  hits {row.hit_rate:.0%}".replace("%", " %"), "dim")
            self._console.print(line)
        self._legend(shades, marks, colours, size, any(row.cached is not None for row in rows))

    def _legend(self, shades: str, marks: str, colours: bool, size: int, knows_cached: bool) -> None:
        self.text()
        across = "experts from left to right" if size == 1 else f"experts from left to right, {size} in a character, their mean"
        starts = (0, *_STEPS)
        ends = (*_STEPS, LEVELS)
        words = [_between(start, end - 1) for start, end in zip(starts, ends, strict=True)]
        told = ", ".join(f"{shade} {word}" for shade, word in zip(shades, words, strict=True))
        self.paragraph(f"{across}; in even shares: {told}.", style="dim")
        if knows_cached:
            how = "green" if colours else " ".join(marks)
            most = "" if size == 1 else ", at least half of them"
            self.paragraph(f"{how}: in the cache when the last run was counted{most}.", style="dim")

    def _can_write(self, characters: str) -> bool:
        try:
            characters.encode(self._console.encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True


def _shade(ratio: float) -> int:
    return sum(level_of(ratio) >= step for step in _STEPS)


def _between(first: int, last: int) -> str:
    """Two levels and those between them, in words."""
    if first == 0:
        return f"under {LEVEL_WORDS[last].rpartition(' ')[2]}"
    if last == LEVELS - 1:
        return f"over {LEVEL_WORDS[first].partition(' ')[0]}"
    return f"{LEVEL_WORDS[first].partition(' ')[0]} to {LEVEL_WORDS[last].rpartition(' ')[2]}"
