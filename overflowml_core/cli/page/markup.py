"""Makes HTML out of text that may hold anything: what is not markup already is escaped."""

from __future__ import annotations

from html import escape

_VOID = frozenset({"meta", "rect", "line", "path", "br"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """An HTML or SVG element.

    Args:
        tag: its name.
        children: Markup as it is, other text escaped.
        attributes: by their names, with _ for - and a _ behind words of Python's own; one of None is left out.
    """
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items() if value is not None)
    if tag in _VOID and not children:
        return Markup(f"<{tag}{written}/>" if tag != "meta" else f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Markup:
    """Several pieces one after the other; text among them is escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _text(child) for child in children))


def _value(value: str | float) -> str:
    return _text(value) if isinstance(value, str) else f"{value:.6g}"


def _text(text: str) -> str:
    # Control characters are no HTML, and half a surrogate pair is no UTF-8.
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))
