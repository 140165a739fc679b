"""Turns a plan into the numbers that the host's engines understand, and what limits it into words. Touches no host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overflowml_comfyui.measurement import Measurement
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


def headroom_bytes(plan: Plan, total_bytes: int, before_bytes: int, is_capped: bool) -> int:
    """What the dynamic engine must keep free of the device while this plan's model samples. It counts everything that is on the device.

    Args:
        plan: of the model.
        total_bytes: memory of the device.
        before_bytes: what it keeps free for everybody.
        is_capped: the budget was asked for.
    """
    return max(before_bytes, total_bytes - plan.budget.device_bytes) if is_capped else before_bytes


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


_SURPRISING = 1.5
"""A step that takes so many times as long as predicted is explained."""


def slow_sentences(one: PassEstimate | None, measured: Measurement | None) -> tuple[str, ...]:
    """Why a step took much longer than predicted, with the numbers of the run; nothing where it did not, or where either is not known.

    Args:
        one: the pass, predicted.
        measured: an earlier run at the same sizes.
    """
    pass_s = None if measured is None else measured.pass_s
    if measured is None or pass_s is None or one is None or not one.pass_s:
        return ()
    found = []
    if measured.passes > measured.steps:
        found.append(
            f"A step called the model {measured.passes / measured.steps:.3g} times (guidance, or a sampler that looks twice): "
            f"each call took {format_seconds(pass_s)}."
        )
    if pass_s < _SURPRISING * one.pass_s:
        return tuple(found)
    if measured.streamed_bytes:
        rate = format_bytes(round(measured.streamed_bytes / pass_s))
        why = f"{format_bytes(measured.streamed_bytes)} of weights were brought in for each call, {rate} a second"
    else:
        why = "all weights were on the device, so it computed longer: a LoRA or a patch, another program on the device, or its clock"
    found.append(f"A call took {pass_s / one.pass_s:.3g} times as long as predicted: {why}.")
    return tuple(found)


_SLOWING_FLAGS: dict[str, tuple[tuple[str, str], ...]] = {
    "link": (
        ("disable_pinned_memory", "makes copies slower"),
        ("disable_async_offload", "makes computing wait for each copy"),
        ("lowvram", "keeps fewer weights on the device"),
        ("novram", "keeps no weights on the device"),
        ("disable_smart_memory", "brings models in anew for every run"),
        ("fp32_unet", "doubles what is copied"),
        ("force_fp32", "doubles what is copied"),
    ),
    "compute": (
        ("cpu", "leaves the accelerator unused"),
        ("force_fp32", "computes in twice the width"),
        ("fp32_unet", "computes in twice the width"),
        ("fp64_unet", "computes in four times the width"),
        ("use_split_cross_attention", "computes attention in pieces"),
        ("use_quad_cross_attention", "computes attention in pieces"),
        ("deterministic", "takes slower kernels"),
    ),
    "memory": (
        ("force_fp32", "doubles what is read"),
        ("fp32_unet", "doubles what is read"),
    ),
    "disk": (("disable_mmap", "reads files whole before they are used"),),
}
"""By what limits a step: the host's arguments that make just that slower (ComfyUI 0.33, comfy/cli_args.py)."""


def flag_advice(bound_by: str | None, flags: Mapping[str, object], has_accelerator: bool = True) -> tuple[str, ...]:
    """Which of the host's start flags would help, by what limits a step.

    Args:
        bound_by: "compute", "memory", "link", "disk" or None.
        flags: the host's arguments by name, those that it has.
        has_accelerator: the machine has one, whether the host uses it or not.
    """
    found = [
        f"--{name.replace('_', '-')} {words}; start without it"
        for name, words in _SLOWING_FLAGS.get(bound_by or "", ())
        if flags.get(name) and (name != "cpu" or has_accelerator)
    ]
    if bound_by == "link":
        for name in ("reserve_vram", "vram_headroom"):
            if not found and _number(flags.get(name)):
                found = [f"--{name.replace('_', '-')} {flags[name]} keeps that many GB free of weights; a smaller one helps"]
    if bound_by == "disk" and not flags.get("fast_disk", True):
        found.append("weights do not fit into RAM; where they lie on an NVMe disk, start with --fast-disk")
    return tuple(found)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
