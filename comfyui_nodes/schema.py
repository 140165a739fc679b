"""What the nodes' fields have in common, and which of the host's schema keywords this version of it knows."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

CATEGORY = "OverflowML"
PlanType = io.Custom("OVERFLOWML_PLAN")

_LARGEST_PIXELS = 65_536


def schema(**fields: Any) -> io.Schema:
    """A node's schema, without keywords that this host does not know: one of them would cost the node its place in the menu."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in known})


def budget_fields() -> list[Any]:
    """Budget and reserve, both empty by default."""
    return [
        io.String.Input(
            "budget",
            default="",
            tooltip="Most memory of the device for this model, such as 12GB or 11.5GiB. Empty: what is free.",
        ),
        io.String.Input(
            "reserve",
            default="",
            tooltip="Of the budget, what is kept for activations, such as 2GB. Empty: estimated from the model and the sizes.",
        ),
    ]


def size_fields() -> list[Any]:
    """Sizes of what will be sampled; 0 is open."""

    def count(name: str, default: int, most: int, tooltip: str) -> Any:
        return io.Int.Input(name, default=default, min=0, max=most, tooltip=tooltip)

    return [
        count("width", 1024, _LARGEST_PIXELS, "Width of what will be sampled, in pixels."),
        count("height", 1024, _LARGEST_PIXELS, "Height of what will be sampled, in pixels."),
        count("frames", 0, _LARGEST_PIXELS, "Frames of a video; 0 for an image."),
        count("batch", 1, 4096, "Images or videos at a time."),
        count("steps", 20, 10_000, "Steps of the sampler."),
    ]


def shown(picture: dict[str, object], text: str) -> dict[str, list[object]]:
    """What a node shows in the page: the picture that our extension draws, and the text that the host's own display takes."""
    return {"overflowml": [picture], "text": [text]}
