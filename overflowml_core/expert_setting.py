"""What an engine is told about routed experts beyond its plan. Plain values; knows nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExpertSetting:
    """How routed experts are run.

    Attributes:
        heat: by (component, block), the share of the tokens that each expert was given before; what a cache starts from.
        fetch_bytes_per_s: rate at which experts come in, by which it is decided how many may be brought in ahead of time; 0 where unknown.
        cpu_bytes_per_s: rate at which the processor computes with experts where they wait; 0 has the device compute all of them.
        looks_ahead: whether experts of the next block are brought in before they are asked for.
        half_life: tokens after which a use counts half for staying in the cache; None finds it out while it runs.
    """

    heat: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    fetch_bytes_per_s: float = 0.0
    cpu_bytes_per_s: float = 0.0
    looks_ahead: bool = True
    half_life: float | None = None
