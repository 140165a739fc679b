"""What the core cannot know of transformers' caches: which of them grow by joining new keys and values behind the present ones."""

from __future__ import annotations

from overflowml_core.runtime.elastic_state import GROWING


def know_caches() -> None:
    """Tell the core; where this version has no such class, nothing is told, and calls with its caches are not made again."""
    from transformers import cache_utils

    # Only the class itself: layers that slide or are quantized keep less than they were given.
    grows = getattr(cache_utils, "DynamicLayer", None)
    if isinstance(grows, type):
        GROWING[grows] = {"keys": -2, "values": -2}
