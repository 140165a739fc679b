"""Traps of formats and variants: weights in another format, and components that are run in slices or tiles."""

from __future__ import annotations

from collections.abc import Iterator

from overflowml_core.facts import Block, Component, Machine, Network, Tier
from overflowml_core.formats import AS_STORED
from overflowml_core.plan import PhasePlan, Placement, Plan
from overflowml_core.traps.objection import ANYWHERE
from overflowml_core.traps.streaming import weights_bytes
from overflowml_core.traps.trap import Step, Trap
from overflowml_core.units import format_bytes

_FP8 = "fp8"
_ATTENTION_SLICING = "attention-slicing"
"""Name that a variant with sliced attention would have; the variants of this project slice batches of a VAE ("slicing")."""


def _converted(plan: Plan, network: Network) -> Iterator[tuple[Placement, Block]]:
    blocks = {(component.name, block.name): block for component in network.components for block in component.blocks}
    for placement in plan.placements():
        block = blocks.get((placement.component, placement.block))
        if placement.format != AS_STORED and block is not None:
            yield placement, block


def _variants(phase: PhasePlan) -> tuple[str, ...]:
    return tuple(part for part in phase.variant.split("+") if part)


def _component_with(phase: PhasePlan, network: Network) -> Component | None:
    """The component of a phase that its variant is one of."""
    mine = [component for component in network.components if component.name in phase.components]
    return next((component for component in mine if any(v.name == phase.variant for v in component.variants)), None)


# ---- FP8


def _fp8_windows_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if "windows" not in machine.environment:
        return None
    moved = [p for p in plan.placements() if p.format == _FP8 and (p.tier is not Tier.DEVICE or _has_home_outside(p))]
    if not moved:
        return None
    tiers = [(_FP8, tier.value) for tier in (Tier.PINNED, Tier.RAM, Tier.DISK)]
    return Step(
        tuple(tiers), f"{len(moved)} blocks in FP8 are to be moved to the device while it runs, on Windows ({moved[0].block} first)"
    )


def _has_home_outside(placement: Placement) -> bool:
    return placement.home is not Tier.DEVICE or placement.experts_home is not None


def _fp8_mps_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if machine.compute.kind != "mps" or not any(p.format == _FP8 for p in plan.placements()):
        return None
    return Step(((_FP8, ANYWHERE),), f"{machine.compute.name} has no 8-bit floating point")


# ---- what must not be converted


def _kept_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    for placement, block in _converted(plan, network):
        if block.keep_format:
            reason = f"{placement.component}.{block.name} is to be kept as it is stored, and the plan converts it to {placement.format}"
            return Step(((placement.format, ANYWHERE),), reason)
    return None


def _kept_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    kept = [block for component in network.components for block in component.blocks if block.keep_format]
    formats = {placement.format for placement, _ in _converted(plan, network)}
    if not kept or not formats:
        return ""
    return f"{len(kept)} blocks lose too much in {' or '.join(sorted(formats))} ({kept[0].name} is one): they stay as they are stored"


def _experts_bytes(placement: Placement, block: Block) -> int:
    """Bytes of routed experts that are no linear layers, so that no format converts them in their block; apart from it they are what a
    format is of."""
    if block.experts is None or block.linear_count >= block.weight_count:
        return 0
    if placement.experts_home is not None and block.experts.matrices:
        return 0
    return block.experts.count * block.experts.nbytes


def _experts_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    for placement, block in _converted(plan, network):
        kept = _experts_bytes(placement, block)
        if placement.stored_bytes < kept:
            reason = (
                f"{placement.component}.{block.name} is to take {format_bytes(placement.stored_bytes)} in {placement.format}, but "
                f"{format_bytes(kept)} of it are stacked experts that are not converted"
            )
            return Step(((placement.format, ANYWHERE),), reason)
    return None


def _experts_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    stacked = sum(_experts_bytes(placement, block) for placement, block in _converted(plan, network))
    return (
        f"{format_bytes(stacked)} are stacked experts, which quantizers leave as they are: the plan counts them in full" if stacked else ""
    )


# ---- variants


def _lossy_tiles_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if plan.limits.quality != "lossless":
        return None
    for phase in plan.phases:
        component = _component_with(phase, network)
        if component is not None and any(v.name == phase.variant and not v.lossless for v in component.variants):
            return Step(
                (("variant", phase.variant),),
                f"{component.name} is to run by {phase.variant}, which blends seams, under quality='lossless'",
            )
    return None


def _absent_variant_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    for phase in plan.phases:
        if phase.variant and _ATTENTION_SLICING not in _variants(phase) and _component_with(phase, network) is None:
            return Step((("variant", phase.variant),), f"no component of {phase.name} can run by {phase.variant}")
    return None


def _absent_variant_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    budget = plan.budget.device_bytes
    for component in network.components:
        if not component.class_name.startswith(("Autoencoder", "VQModel")) or component.variants or not component.activation_bytes:
            continue
        if weights_bytes(component) + component.activation_bytes > budget // 2 and plan.phase_of(component.name) is not None:
            return (
                f"{component.class_name} has neither tiles nor slices, and {format_bytes(component.activation_bytes)} of activations: "
                "the plan keeps room for all of them"
            )
    return ""


def _decode_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    for phase in plan.phases:
        component = _component_with(phase, network) if phase.variant else None
        if component is not None and _ATTENTION_SLICING not in _variants(phase):
            needed = weights_bytes(component) + component.activation_bytes
            if needed > plan.budget.device_bytes:
                return (
                    f"{component.name} in one piece takes {format_bytes(needed)}, activations included, "
                    f"of {format_bytes(plan.budget.device_bytes)}: the run would fail at its very end"
                )
    return ""


def _slicing_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    for phase in plan.phases:
        if phase.streamed and _ATTENTION_SLICING in _variants(phase):
            return Step((("variant", phase.variant),), f"{phase.name} is streamed, and its attention is to be sliced as well")
    return None


def _slicing_relevance(plan: Plan, network: Network, machine: Machine) -> str:
    # Only the UNets and ControlNets of diffusers can slice their attention; for the others the flag does nothing.
    for phase in plan.phases:
        sliceable = [c for c in network.components if c.name in phase.components and c.class_name.startswith(("UNet", "ControlNet"))]
        if phase.streamed and sliceable:
            return f"{sliceable[0].name} is streamed, and slices would run its attention in many small kernels between the copies"
    return ""


def _slicing_mps_step(plan: Plan, network: Network, machine: Machine) -> Step | None:
    if machine.compute.kind != "mps":
        return None
    for phase in plan.phases:
        if _ATTENTION_SLICING in _variants(phase):
            return Step((("variant", phase.variant),), f"{phase.name} is to run with sliced attention on {machine.compute.name}")
    return None


TRAPS: tuple[Trap, ...] = (
    Trap(
        name="fp8-offload-on-windows",
        kind="plan",
        applies_when="weights in FP8 are offloaded to RAM on Windows",
        symptom="a crash in the middle of the run: moving the quantized tensors is not supported everywhere",
        what_we_do=(
            "on Windows FP8 is only planned for blocks that stay on the device. This engine moves the plain tensors inside a quantized one "
            "and never the quantized one itself, but nobody has run that on Windows yet"
        ),
        evidence=("pytorch/ao #3373", "diffusers #13281"),
        step=_fp8_windows_step,
    ),
    Trap(
        name="fp8-on-mps",
        kind="plan",
        applies_when="weights are converted to FP8 for Apple's GPU",
        symptom="TypeError: the MPS backend has no support for that dtype",
        what_we_do="FP8 is not planned on Apple silicon; INT8 and INT4 are",
        evidence=("pytorch #148420", "ComfyUI #9263"),
        step=_fp8_mps_step,
    ),
    Trap(
        name="kept-blocks-converted",
        kind="plan",
        applies_when="blocks that a model wants in their own format are converted or cast with the rest (T5's wo, Wan's norms)",
        symptom="infinities in half precision: black images or noise, without an error",
        what_we_do="these blocks keep the format in which they are stored, and the plan counts them in full",
        evidence=("transformers 5.23.0 models/t5/modeling_t5.py, _keep_in_fp32_modules", "diffusers 0.42.1 loaders/single_file_model.py"),
        step=_kept_step,
        relevance=_kept_relevance,
    ),
    Trap(
        name="stacked-experts-unconverted",
        kind="plan",
        applies_when="a model with stacked experts is quantized by its linear layers",
        symptom="most of the bytes stay as they were without a word, and the model does not fit as promised",
        what_we_do="only linear weights are counted as converted; a plan that counts on the experts is refused",
        evidence=("bitsandbytes #1849", "transformers 5.23.0 integrations/moe.py"),
        step=_experts_step,
        relevance=_experts_relevance,
    ),
    Trap(
        name="tiles-are-not-lossless",
        kind="plan",
        applies_when="a VAE is tiled to save memory where the result must not change",
        symptom="faint seams and colour shifts between tiles",
        what_we_do="under quality='lossless' no variant is planned that blends tiles",
        evidence=("diffusers 0.42.1 models/autoencoders/autoencoder_kl.py, blend_v",),
        step=_lossy_tiles_step,
    ),
    Trap(
        name="variant-not-offered",
        kind="plan",
        applies_when="tiling or slicing is asked of an autoencoder that has neither",
        symptom="NotImplementedError, or a flag that is set and read by nobody",
        what_we_do="a variant is planned only where the component has it, with its own measured activations",
        evidence=("diffusers 0.42.1 models/autoencoders/vae.py, AutoencoderMixin", "diffusers #11385"),
        step=_absent_variant_step,
        relevance=_absent_variant_relevance,
    ),
    Trap(
        name="vae-decode-peak",
        kind="plan",
        applies_when="a pipeline's memory is judged by its weights and its largest component, and the image is decoded in one piece",
        symptom="out of memory after the last step, when all the work is done",
        what_we_do="the decode is a phase of its own; tiling or slicing is switched on exactly when the budget needs it",
        evidence=("diffusers #10350",),
        relevance=_decode_relevance,
    ),
    Trap(
        name="attention-slicing-with-offload",
        kind="plan",
        applies_when="attention slicing is switched on together with sequential offload",
        symptom="much slower: fused attention needs no slices, each slice is one more launch; black images on some devices",
        what_we_do=(
            "no plan slices attention. With this engine the pair is harmless, for a block is on the device as a whole while "
            "its attention runs; it only costs time"
        ),
        evidence=(
            "diffusers #4487",
            "diffusers 0.42.1 pipelines/pipeline_utils.py, enable_attention_slicing",
        ),
        step=_slicing_step,
        relevance=_slicing_relevance,
    ),
    Trap(
        name="attention-slicing-on-mps",
        kind="plan",
        applies_when="attention slicing is switched on with component offload on Apple silicon",
        symptom="black images: the slices read memory that the offload has given back",
        what_we_do="no plan slices attention, and one that does is refused there",
        evidence=("diffusers #14438",),
        step=_slicing_mps_step,
    ),
)
"""Traps of formats and variants."""
