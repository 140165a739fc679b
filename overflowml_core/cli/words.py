"""The words of the command line: speeds, risks, strategies, works. A word stands beside its number, never in the place of it."""

from __future__ import annotations

from collections.abc import Iterable

from overflowml_core.facts import Workload
from overflowml_core.machine import Machine
from overflowml_core.plan import Estimate, Plan
from overflowml_core.units import format_bytes, format_seconds

FAST, MEDIUM, SLOW = 1.5, 4.0, 16.0
"""Most times as long as the fastest that a way may take to be called fast, medium or slow."""
_SAME = 1.03
"""What takes so many times as long at most is as fast; the planner too takes less for no difference."""

RISKS = {"lossless": "none", "minimal": "minimal", "any": "notable"}
"""What a plan does to the result, by ``Plan.quality``."""

STRATEGIES = {
    "direct": "everything stays on the device",
    "phased": "the phases take turns on the device; nothing is streamed within one",
    "stream": "blocks that do not fit are copied to the device right before they compute",
    "sequential": "every block is copied to the device right before it computes, so that the least memory is taken",
    "experts": "routed experts wait outside the device and are fetched when a token needs them",
    "devices": "blocks are spread over several devices",
    "cpu": "the CPU computes, in RAM",
}
"""What each kind of strategy does."""


def speed_words(seconds: Iterable[float | None]) -> list[str]:
    """A word for each time, by its ratio to the shortest one.

    "fastest" up to 1.03 times as long, "fast" up to 1.5 times, "medium" up to 4, "slow" up to 16, "slowest" beyond that; "unknown" where
    there is no time. The words depend on nothing but the times in this list: nothing is slow in itself.
    """
    times = list(seconds)
    known = [s for s in times if s is not None]
    shortest = min(known, default=0.0)
    return ["unknown" if s is None else _word(s / shortest if shortest > 0 else 1.0 if s <= 0 else float("inf")) for s in times]


def _word(ratio: float) -> str:
    steps = ((_SAME, "fastest"), (FAST, "fast"), (MEDIUM, "medium"), (SLOW, "slow"))
    return next((word for most, word in steps if ratio <= most), "slowest")


def strategy_words(strategy: str) -> str:
    """What a strategy does; empty where only a plugin knows."""
    kind, _, form = strategy.partition(" ")
    told = STRATEGIES.get(kind, "")
    return f"{told}; weights in {form}" if told and form else told


def seconds_words(seconds: float | None) -> str:
    """A time, or a question mark where nobody knows it."""
    if seconds is None:
        return "?"
    if seconds < 3600:
        return format_seconds(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours:.0f} h {rest // 60:02.0f} min"


def memory_heading(plan: Plan) -> str:
    """What the memory of the compute tier is called."""
    return "Est RAM" if plan.device == "cpu" and plan.kind != "cpu" else "Est VRAM"


def vram_words(strategy: str, estimate: Estimate | None) -> str:
    """What a way takes of the device: "none" where the CPU computes in the place of one, a question mark where nobody knows."""
    if strategy.partition(" ")[0] == "cpu":
        return "none"
    return "?" if estimate is None else format_bytes(estimate.device_peak_bytes)


def token_words(estimate: Estimate | None, batch: int) -> str:
    """Tokens a second of all sequences together; empty where no language model answers."""
    return "" if estimate is None or not estimate.token_s else f"{batch / estimate.token_s:.3g} tokens/s"


def hardware_words(machine: Machine) -> str:
    """A machine in a line."""
    named = [f"{a.name} ({'shared ' if a.unified else ''}{format_bytes(a.total_bytes)})" for a in machine.accelerators]
    counts = {name: named.count(name) for name in named}
    parts = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()] or [f"CPU, {machine.host.core_count} cores"]
    return f"{', '.join(parts)}, {format_bytes(machine.host.total_bytes)} RAM"


def work_words(plan: Plan) -> str:
    """What the times of a plan are for: "1 x prefill, 255 x token"; empty where nothing is known of its passes."""
    counts: dict[str, int] = {}
    for phase in plan.phases:
        for one in phase.passes:
            name = f"{one.component} {one.name}" if len(plan.phases) > 1 or len(phase.components) > 1 else one.name
            counts[name] = counts.get(name, 0) + one.count
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def workload_words(workload: Workload) -> str:
    """What the user said of the work; empty where nothing was."""
    size = f"{workload.width or '?'} x {workload.height or '?'} pixels" if workload.width or workload.height else ""
    counts = (
        (workload.frames, "frames"),
        (workload.batch if workload.batch > 1 else None, "at once"),
        (workload.steps, "steps"),
        (workload.prompt_tokens, "prompt tokens"),
        (workload.new_tokens, "new tokens"),
    )
    return ", ".join(filter(None, (size, *(f"{count} {what}" for count, what in counts if count is not None))))
