"""Turns a plan into the numbers that the host's engines understand, and what limits it into words. Touches no host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overflowml_core.plan import PassEstimate, Plan
from overflowml_core.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What the host says of a device right before it loads a model, in bytes.

    Attributes:
        free_bytes: free, with what the host's models hold and would give back.
        estimate_bytes: what the host itself keeps free for the model's activations.
        reserved_bytes: what it keeps free beside that for everybody (``EXTRA_RESERVED_VRAM``).
    """

    free_bytes: int
    estimate_bytes: int
    reserved_bytes: int


def reserve_bytes(plan: Plan, state: DeviceState, is_capped: bool) -> int:
    """What the estimating engine must keep free while it loads this plan's model, so that the plan's bytes are what it takes.

    The engine fills what is free, less its own estimate and this reserve, with weights. Never less than it reserves anyway.

    Args:
        plan: of the model alone.
        state: the device's, at the moment of the load.
        is_capped: the budget was asked for; otherwise the plan's is what happened to be free, and is no limit.
    """
    beyond_budget = max(state.free_bytes - plan.budget.device_bytes, 0) if is_capped else 0
    activations = max((phase.activation_bytes for phase in plan.phases), default=0)
    return state.reserved_bytes + beyond_budget + max(activations - state.estimate_bytes, 0)


_BOUND = {
    "compute": "arithmetic of the device",
    "memory": "the device's own memory",
    "link": "copies of weights to the device",
    "disk": "reads of weights from disk",
}


def limit_sentence(one: PassEstimate | None, streamed_bytes: int = 0) -> str:
    """What a pass spends its time with, with numbers; a sentence that says what to do where nothing is known.

    Args:
        one: the pass, predicted.
        streamed_bytes: weights that are brought in for it.
    """
    if one is None or one.pass_s is None or one.bound_by not in _BOUND:
        return "What limits a step is not known: this machine's rates are not measured; run the OverflowML Calibrate node once."
    numbers = [f"{format_seconds(one.compute_s)} of computing"] if one.compute_s is not None else []
    if one.transfer_s:
        numbers.append(f"{format_seconds(one.transfer_s)} of copies ({format_bytes(streamed_bytes)})")
    if one.stall_s:
        numbers.append(f"{format_seconds(one.stall_s)} of waiting")
    return f"A step is limited by {_BOUND[one.bound_by]}: {', '.join(numbers)}."


_LINK_FLAGS = (
    ("disable_pinned_memory", "--disable-pinned-memory makes copies slower; start without it"),
    ("disable_async_offload", "--disable-async-offload makes computing wait for each copy; start without it"),
    ("lowvram", "--lowvram keeps fewer weights on the device; start without it"),
    ("novram", "--novram keeps no weights on the device; start without it"),
)


def flag_advice(bound_by: str | None, flags: Mapping[str, object]) -> tuple[str, ...]:
    """Which of the host's start flags would help, by what limits a step.

    Args:
        bound_by: "compute", "memory", "link", "disk" or None.
        flags: the host's arguments by name, those that it has.
    """
    if bound_by == "link":
        found = [words for name, words in _LINK_FLAGS if flags.get(name)]
        if not found and _number(flags.get("reserve_vram")):
            found = [f"--reserve-vram {flags['reserve_vram']} keeps that many GB free of weights; a smaller one helps"]
        return tuple(found)
    if bound_by == "disk" and not flags.get("fast_disk", True):
        return ("weights do not fit into RAM; where they lie on an NVMe disk, start with --fast-disk",)
    return ()


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
