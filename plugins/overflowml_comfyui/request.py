"""What users write into the nodes' fields, as the core's workloads and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from overflowml_core.errors import BadLimits, BadSize
from overflowml_core.facts import Limits, Workload
from overflowml_core.units import parse_bytes

QUALITY = "lossless"
"""The host executes what these nodes plan with weights as they are loaded."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan.

    Attributes:
        workload: sizes in pixels, frames, images and steps.
        budget_bytes: of the device for this model; None for what is free.
        reserve_bytes: of it, kept for activations; None lets the plan estimate them.
    """

    workload: Workload
    budget_bytes: int | None = None
    reserve_bytes: int | None = None

    @property
    def limits(self) -> Limits:
        """The same as the planner takes it."""
        return Limits.exactly(self.budget_bytes, None, self.reserve_bytes, quality=QUALITY)


def request_of(fields: Mapping[str, object]) -> Request:
    """Read a node's fields: ``budget``, ``reserve`` ("12GB", or empty), ``width``, ``height``, ``frames``, ``batch``, ``steps`` (0: open).

    Raises:
        BadSize: a size cannot be read.
        BadLimits: a number is not a whole one from 0, or the reserve is not smaller than the budget.
    """
    budget, reserve = (_size(fields.get(name), name) for name in ("budget", "reserve"))
    counts = {name: _count(fields.get(name), name) for name in ("width", "height", "frames", "batch", "steps")}
    batch = counts.pop("batch") or 1
    request = Request(Workload(batch=batch, **counts), budget, reserve)
    request.limits  # noqa: B018 -- refuses fields that contradict each other before anybody plans with them
    return request


def _size(value: object, name: str) -> int | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, (int, str)):
        raise BadSize(name, value)
    return parse_bytes(value.strip() if isinstance(value, str) else value, name)


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value) or value < 0:
        raise BadLimits(f"{name}={value!r}: give a whole number from 1, or 0 where it is open")
    return int(value) or None
