"""A plan as one page for a browser, with everything in it: no script, style or picture from elsewhere."""

from __future__ import annotations

from overflowml_core.cli.page.document import page_of

__all__ = ["page_of"]
