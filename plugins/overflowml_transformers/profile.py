"""What a transformers model computes and holds: its own code, built again from its config, run on tensors without data."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from overflowml_core.activations import ASSUMED_TOKENS
from overflowml_core.analytic import ASSUMED_NEW_TOKENS, language_model_profiles, language_shape
from overflowml_core.facts import Component, Network, Workload
from overflowml_core.runtime.fake import TooLong, tracing
from overflowml_core.runtime.probe import TRACED, peak_of
from overflowml_core.runtime.probe_fit import continued
from overflowml_core.runtime.structure import own_blocks
from overflowml_core.work import PassProfile
from overflowml_transformers.describe import Pattern
from overflowml_transformers.passes import COMPONENT, Untraceable, filled_in, passes

_BLOCK_OPERATIONS = 2000
"""Operations in one call of a block beyond which its code goes token after token: without their kernels Mamba's blocks take 31 a token,
those with a delta rule 457 and up to 47 more for each chunk of 64. All others counted here take less than 300 (transformers 5.23)."""

_TOKEN_STEPS = (16, 32, 48)
"""Tokens at which code that goes token after token is traced instead: more than the windows of its convolutions, few enough for seconds."""

_CHUNK_STEPS = (64, 128, 192)
"""The same for code that goes in chunks: whole ones, of 64 tokens in all of transformers 5.23's delta rules."""


def measure_model(pattern: Pattern, network: Network, workload: Workload) -> Network:
    """The network with the profiles of its only component.

    Where the code cannot be run without data the passes are arithmetic over the config, and say why.

    Args:
        pattern: what to build again.
        network: its description.
        workload: tokens, batch, pixels.
    """
    (component,) = network.components
    workload = filled_in(workload, pattern.config, pattern.model_class.can_generate())
    try:
        try:
            profiles = _traced(pattern, component, workload)
        except TooLong:
            profiles = _continued(pattern, component, workload)
    except Exception as error:  # noqa: BLE001 -- whatever stops a host's code on tensors without data, arithmetic is the answer
        profiles = _analytic(pattern, component, workload, _reason(error))
    measured = replace(
        component,
        profiles=profiles,
        activation_bytes=peak_of(profiles),
        activation_source=TRACED if all(profile.source == TRACED for profile in profiles) else "analytic",
    )
    return replace(network, components=(measured,))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else ""
    return first if isinstance(error, Untraceable) else f"its code does not run without data ({type(error).__name__}: {first})"


def _analytic(pattern: Pattern, component: Component, workload: Workload, why: str) -> tuple[PassProfile, ...]:
    generates = pattern.model_class.can_generate()
    shape = language_shape(pattern.config, component.blocks, pattern.element_bytes, generates)
    return language_model_profiles(shape, workload, why)


def _traced(pattern: Pattern, component: Component, workload: Workload) -> tuple[PassProfile, ...]:
    model = build(pattern)
    if [name for name, _ in own_blocks(model)] != [block.name for block in component.blocks]:
        raise Untraceable(f"{pattern.model_class.__name__} built from its config has other blocks than the model itself")
    with tracing(_BLOCK_OPERATIONS) as tracer:
        tracer.watch(COMPONENT, model)
        return tuple(passes(tracer, model, workload))


def _continued(pattern: Pattern, component: Component, workload: Workload) -> tuple[PassProfile, ...]:
    """Traces at a few short prompts, continued to the workload's: every number follows a polynomial of the second degree in the tokens."""
    if not pattern.model_class.can_generate() or pattern.config.is_encoder_decoder:
        raise Untraceable("its code goes token after token")

    def trace(tokens: int) -> tuple[PassProfile, ...]:
        return _traced(pattern, component, replace(workload, prompt_tokens=tokens, new_tokens=2))

    points = _TOKEN_STEPS
    short = [trace(tokens) for tokens in points[:2]]
    if _operations(short[0]) == _operations(short[1]):
        points, short = _CHUNK_STEPS, [trace(tokens) for tokens in _CHUNK_STEPS]
    else:
        short.append(trace(points[2]))
    prompt, answer = workload.prompt_tokens or ASSUMED_TOKENS, workload.new_tokens or ASSUMED_NEW_TOKENS
    note = f"its code goes token after token: traced at {', '.join(map(str, points))} tokens and continued from there"
    found: list[PassProfile] = []
    for traces in zip(*short, strict=True):
        if traces[0].name != "token":
            found.append(continued(traces, points, prompt, traces[0].count, note))
        elif answer > 1:
            found.append(continued(traces, points, prompt + answer - 2, answer - 1, note))
    return tuple(found)


def _operations(profiles: tuple[PassProfile, ...]) -> int:
    return sum(work.calls for profile in profiles for block in profile.blocks for work in block.works)


def build(pattern: Pattern) -> Any:
    """The model again, on the meta device, with the dtype of every weight as it is in the original. The config is copied."""
    config = copy.deepcopy(pattern.config)
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        # Kernels of other packages need a device; what they hold and compute is what fused attention does.
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = pattern.model_class(config).eval()
    by_old: dict[int, Any] = {}
    for path, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                wanted = pattern.dtypes.get(f"{path}.{name}" if path else name)
                if tensor is None or wanted is None or tensor.dtype is wanted:
                    continue
                if id(tensor) not in by_old:
                    by_old[id(tensor)] = (tensor, _cast(tensor, wanted))
                kind[name] = by_old[id(tensor)][1]
    return model


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.detach().to(dtype)
    return torch.nn.Parameter(cast, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else cast
