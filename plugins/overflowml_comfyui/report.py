"""A decision as text for a node's output, and as plain values that the page draws. Reads values alone."""

from __future__ import annotations

from overflowml_comfyui.decision import Decision, Part
from overflowml_comfyui.lowering import limit_sentence, slow_sentences
from overflowml_comfyui.measurement import Measurement
from overflowml_core.facts import Tier
from overflowml_core.planner.explain import residency_strip
from overflowml_core.units import format_bytes, format_seconds


def text_of(decision: Decision, engine: str, advice: tuple[str, ...] = ()) -> str:
    """The report.

    Args:
        decision: what was planned.
        engine: a sentence about how the host carries it out.
        advice: sentences about the host's start flags.
    """
    lines = [f"{decision.verdict}: peak {format_bytes(decision.peak_bytes)} of the device" if decision.peak_bytes else decision.verdict]
    for part in decision.parts:
        lines += ["", f"{part.name} (weights {part.component.content})"]
        lines += [f"  {line}" for line in _part_lines(part)]
    return "\n".join([*lines, "", engine, *advice])


def _part_lines(part: Part) -> list[str]:
    if part.plan is None:
        return [part.refusal]
    plan, lines = part.plan, []
    for phase in plan.phases:
        stays = phase.fixed_bytes + phase.resident_bytes
        moves = sum(placement.stored_bytes for placement in phase.streamed)
        streamed = f", streamed {format_bytes(moves)}" if moves else ""
        lines.append(f"resident {format_bytes(stays)}{streamed}, activations {format_bytes(phase.activation_bytes)}")
        if phase.streamed:
            lines.append(residency_strip(phase.placements))
    one = part.slowest
    budget = format_bytes(plan.budget.device_bytes)
    lines.append(f"peak {format_bytes(plan.estimate.device_peak_bytes)} of {budget} on {plan.device_name}; plan {part.fingerprint}")
    lines.append(_step_line(None if one is None else one.pass_s, part.measured))
    lines.append(limit_sentence(one, plan.estimate.streamed_bytes))
    lines += slow_sentences(one, part.measured)
    return lines


def _step_line(predicted_s: float | None, measured: Measurement | None) -> str:
    said = "step: not predicted" if predicted_s is None else f"step: {format_seconds(predicted_s)} predicted"
    if measured is None:
        return f"{said}, not measured yet"
    peak = "" if measured.peak_bytes is None else f", peak {format_bytes(measured.peak_bytes)}"
    return f"{said}, {format_seconds(measured.step_s)} measured over {measured.steps} steps{peak}"


def picture_of(decision: Decision) -> dict[str, object]:
    """What the page draws: bytes and seconds under names that say so, no text that it would have to take apart."""
    return {
        "verdict": decision.verdict,
        "peak_bytes": decision.peak_bytes,
        "refusal": decision.refusal,
        "parts": [_part_values(part) for part in decision.parts],
    }


def _part_values(part: Part) -> dict[str, object]:
    measured = part.measured
    values: dict[str, object] = {
        "name": part.name,
        "key": part.key,
        "verdict": part.verdict,
        "refusal": part.refusal,
        "weights_fingerprint": part.component.content,
        "measured_step_s": None if measured is None else measured.step_s,
        "measured_peak_bytes": None if measured is None else measured.peak_bytes,
    }
    if part.plan is None:
        return values
    plan, one = part.plan, part.slowest
    placements = plan.placements()
    return {
        **values,
        "plan_fingerprint": part.fingerprint,
        "device": plan.device_name,
        "budget_bytes": plan.budget.device_bytes,
        "peak_bytes": plan.estimate.device_peak_bytes,
        "fixed_bytes": sum(phase.fixed_bytes for phase in plan.phases),
        "resident_bytes": sum(p.stored_bytes for p in placements if p.tier is Tier.DEVICE),
        "streamed_bytes": sum(p.stored_bytes for p in placements if p.tier is not Tier.DEVICE),
        "activation_bytes": max((phase.activation_bytes for phase in plan.phases), default=0),
        "predicted_step_s": None if one is None else one.pass_s,
        "limit": " ".join([limit_sentence(one, plan.estimate.streamed_bytes), *slow_sentences(one, measured)]),
    }
