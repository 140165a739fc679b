"""Ways of running a VAE that take less memory, slices of a batch and tiles of a picture: what they take, and how they are switched on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from overflowml_core.facts import PassProfile, Variant
from overflowml_core.runtime.probe import pass_profile
from overflowml_diffusers.replay import Known, View
from overflowml_diffusers.vae import TracedVae

SLICING, TILING = "slicing", "tiling"
SEPARATOR = "+"
"""Between the names of switches that a variant turns on together."""

SWITCHES = {SLICING: "use_slicing", TILING: "use_tiling"}
"""By name of a switch the attribute that diffusers' ``enable_slicing`` and ``enable_tiling`` set."""

_log = logging.getLogger("overflowml")


def find_variants(traced: TracedVae, calls: list[tuple[str, Known, PassProfile]]) -> tuple[Variant, ...]:
    """Variants of a VAE that lower the peak of its passes, the least costly first. The trace in which its calls were seen is still open.

    Args:
        traced: the VAE.
        calls: method, call and profile of each of its passes.
    """
    module = traced.module
    able = [name for name in SWITCHES if name in switches_of(module) and not getattr(module, SWITCHES[name])]
    names = [name for name in able if name != SLICING or any(_batch(known) > 1 for _, known, _ in calls)]
    if len(names) == len(SWITCHES):
        names.append(SLICING + SEPARATOR + TILING)
    found: list[Variant] = []
    lowest = max((profile.activation_bytes for _, _, profile in calls), default=0)
    for name in names:
        restore = turn_on(module, name)
        try:
            made = tuple(_again(traced, method, known, profile) for method, known, profile in calls)
        except Exception as error:  # noqa: BLE001 -- foreign code on fake tensors; a variant that cannot run so is no variant
            _log.info("%s with %s cannot run on fake tensors (%s: %s)", type(module).__name__, name, type(error).__name__, error)
            continue
        finally:
            restore()
        peak = max(profile.activation_bytes for profile in made)
        if peak < lowest:
            found.append(Variant(name, TILING not in name, made))
            lowest = peak
    return tuple(found)


def _batch(known: Known) -> int:
    """Pictures in a call: the first dimension of its first tensor."""
    return next((view.size[0] for view in known.arguments[0] if isinstance(view, View) and view.size), 1)


def _again(traced: TracedVae, method: str, known: Known, plain: PassProfile) -> PassProfile:
    _match_dtype(traced.module, known)
    call = traced.again(method, known)
    entry_bytes = known.peak_bytes - known.own_bytes
    peak_bytes = entry_bytes + max(call.activation_bytes - call.entry_bytes, 0)
    return replace(pass_profile(call, plain.name, plain.count), activation_bytes=peak_bytes)


def _match_dtype(module: nn.Module, known: Known) -> None:
    """Have a VAE in the dtype of its input: pipelines cast it for as long as they decode in float32."""
    dtype = next((v.dtype for v in known.arguments[0] if isinstance(v, View) and v.dtype.is_floating_point), None)
    if dtype is not None and next(module.parameters()).dtype != dtype:
        module.to(dtype)


def switches_of(module: object) -> set[str]:
    """Names of the switches that a module has: "slicing", "tiling", both or none."""
    return {
        name for name, attribute in SWITCHES.items() if callable(getattr(module, f"enable_{name}", None)) and hasattr(module, attribute)
    }


def turn_on(module: Any, name: str) -> Callable[[], None]:
    """Switch a variant on and return what restores the former state.

    Args:
        module: a VAE of diffusers.
        name: of a variant: "slicing", "tiling" or "slicing+tiling".
    """
    switches = name.split(SEPARATOR)
    before = {SWITCHES[switch]: getattr(module, SWITCHES[switch]) for switch in switches}
    for switch in switches:
        getattr(module, f"enable_{switch}")()

    def restore() -> None:
        for attribute, value in before.items():
            setattr(module, attribute, value)

    return restore
