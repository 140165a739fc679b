"""Expert heat as one page for a browser, with everything in it: the picture and the figures of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from overflowml_core.cli.heat.drawing import drawing
from overflowml_core.cli.heat.picture import Row
from overflowml_core.cli.page.markup import Markup, element


def page_of(title: str, figures: str, rows: Sequence[Row], headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The page as HTML.

    Args:
        title: what is shown.
        figures: a line of numbers.
        rows: of the picture.
        headings: of the table below it.
        cells: a row of the table for each row of the picture.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing is fetched and nothing runs, whatever a name in a file may hold.
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("title", title),
        element("style", Markup(_style())),
    )
    marks = ["figure" if place else None for place in range(len(headings))]
    head_row = element("tr", *(element("th", heading, class_=mark, scope="col") for heading, mark in zip(headings, marks, strict=True)))
    body = [
        element("tr", *(element("td", c, class_=m, data_heading=h) for c, m, h in zip(row, marks, headings, strict=True))) for row in cells
    ]
    table = element("div", element("table", element("thead", head_row), element("tbody", *body)), class_="table")
    content = element("main", element("div", drawing(title, figures, rows), class_="scroll"), element("h2", "Layers"), table)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', content), lang='en')}\n"


def _style() -> str:
    own = resources.files("overflowml_core.cli.page").joinpath("page.css").read_text(encoding="utf-8")
    return f"{own}\n.scroll svg.heat {{ display: block; width: 100%; min-width: 48rem; }}\n"
