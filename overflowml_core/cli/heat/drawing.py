"""The picture of expert heat as SVG with everything in it: no script, font or style from elsewhere. Colours follow the reader's scheme."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from overflowml_core.cli.heat.picture import LEVEL_WORDS, LEVELS, Row, level_of
from overflowml_core.cli.page.markup import Markup, element, joined

_WIDTH = 1000
"""Of the cells, in the drawing's own units."""
_LEFT, _RIGHT, _TOP = 150, 190, 58
_TALLEST_ROW, _LOWEST_ROW, _MOST_HEIGHT = 22.0, 10.0, 1200.0
_LEGEND = 64
_LARGEST_MARK = 5.0
_TICKS = 8

_STYLE = """
svg.heat { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d1f23; --dim: #5c6068; --mark: #1f5fbf;
  --h0: #f1efec; --h1: #fbe3cd; --h2: #fbcfa5; --h3: #f7b476; --h4: #ee9145; --h5: #d86b1c; --h6: #a94a0c; --h7: #6d2d06; }
@media (prefers-color-scheme: dark) { svg.heat { --paper: #16181c; --ink: #e8e9ec; --dim: #a1a6b0; --mark: #7db4ff;
  --h0: #212429; --h1: #3a2a1f; --h2: #573722; --h3: #7c4a24; --h4: #a86429; --h5: #d38438; --h6: #f2ae68; --h7: #ffe0bd; } }
.heat text { font: 12px system-ui, sans-serif; fill: var(--dim); }
.heat .title { font-size: 16px; font-weight: 600; fill: var(--ink); }
.heat .name, .heat .number { fill: var(--ink); }
.heat .number { font-variant-numeric: tabular-nums; }
.heat .paper { fill: var(--paper); }
.heat .cached { fill: var(--mark); stroke: var(--paper); stroke-width: 1; }
"""


def drawing(title: str, figures: str, rows: Sequence[Row]) -> Markup:
    """The picture.

    Args:
        title: what is shown.
        figures: a line of numbers below it.
        rows: one for each bank.
    """
    height = min(_TALLEST_ROW, max(_LOWEST_ROW, _MOST_HEIGHT / max(1, len(rows))))
    most = max((len(row.ratios) for row in rows), default=1)
    width = _WIDTH / most
    bottom = _TOP + height * len(rows)
    whole = bottom + _LEGEND
    paths = [_cells(rows, level, width, height) for level in range(LEVELS)]
    style = _STYLE + "".join(f".heat .h{level} {{ fill: var(--h{level}); }}\n" for level in range(LEVELS))
    children = (
        element("title", title),
        element("desc", f"{figures}. Layers down, experts across, darker or brighter where an expert is chosen more often."),
        element("style", Markup(style)),
        element("rect", width="100%", height="100%", class_="paper"),
        element("text", title, x=16, y=26, class_="title"),
        element("text", figures, x=16, y=46),
        *paths,
        _marks(rows, width, height),
        *_names(rows, height),
        *_axis(most, width, bottom),
        *_legend(bottom + 34, any(row.cached is not None for row in rows)),
    )
    box = f"0 0 {_LEFT + _WIDTH + _RIGHT} {whole:.0f}"
    return element("svg", *children, xmlns="http://www.w3.org/2000/svg", viewBox=box, class_="heat", role="img")


def _cells(rows: Sequence[Row], level: int, width: float, height: float) -> Markup:
    """All experts of one level as one shape; those side by side in one piece."""
    pieces: list[str] = []
    for place, row in enumerate(rows):
        y, expert = _TOP + place * height, 0
        for own, members in groupby(row.ratios, key=level_of):
            x, count = _LEFT + expert * width, len(list(members))
            if own == level:
                pieces.append(f"M{x:.6g},{y:.6g}h{count * width:.6g}v{height - 1:.6g}H{x:.6g}z")
            expert += count
    return element("path", d="".join(pieces), class_=f"h{level}") if pieces else Markup("")


def _marks(rows: Sequence[Row], width: float, height: float) -> Markup:
    size = min(_LARGEST_MARK, width * 0.6, height * 0.4)
    pieces: list[str] = []
    for place, row in enumerate(rows):
        y = _TOP + (place + 0.5) * height - size / 2
        for expert in sorted(row.cached or ()):
            x = _LEFT + (expert + 0.5) * width - size / 2
            pieces.append(f"M{x:.6g},{y:.6g}h{size:.6g}v{size:.6g}h-{size:.6g}z")
    return element("path", d="".join(pieces), class_="cached") if pieces else Markup("")


def _names(rows: Sequence[Row], height: float) -> list[Markup]:
    """Names to the left, figures to the right; as many as fit below each other."""
    every = max(1, -(-13 // int(max(1.0, height))))
    drawn: list[Markup] = []
    for place, row in enumerate(rows):
        y = _TOP + (place + 0.5) * height + 4
        if place % every == 0:
            label = row.label if len(row.label) <= 22 else f"\u2026{row.label[-21:]}"
            drawn.append(element("text", label, x=_LEFT - 8, y=y, text_anchor="end", class_="name"))
            drawn.append(element("text", _figures(row), x=_LEFT + _WIDTH + 8, y=y, class_="number"))
    return drawn


def _figures(row: Row) -> str:
    hits = "" if row.hit_rate is None else f"hits {row.hit_rate:.0%}".replace("%", " %")
    return ", ".join(filter(None, (hits, f"busiest tenth {row.busiest:.0%}".replace("%", " %"))))


def _axis(most: int, width: float, bottom: float) -> list[Markup]:
    step = max(1, round(most / _TICKS))
    middles = [(expert, _LEFT + (expert + 0.5) * width) for expert in range(0, most, step)]
    ticks = [element("text", str(expert), x=x, y=bottom + 14, text_anchor="middle") for expert, x in middles]
    return [*ticks, element("text", "expert", x=_LEFT - 8, y=bottom + 14, text_anchor="end")]


def _legend(y: float, knows_cached: bool) -> list[Markup]:
    drawn = [element("text", "of an even share:", x=_LEFT - 8, y=y + 10, text_anchor="end")]
    for level, words in enumerate(LEVEL_WORDS):
        x = _LEFT + level * 105
        drawn.append(element("rect", x=x, y=y, width=12, height=12, class_=f"h{level}"))
        drawn.append(element("text", words, x=x + 18, y=y + 10))
    if knows_cached:
        x = _LEFT + LEVELS * 105
        drawn.append(element("rect", x=x, y=y + 3, width=6, height=6, class_="cached"))
        drawn.append(element("text", "in the cache", x=x + 14, y=y + 10))
    return [joined(*drawn)]
