"""Casts the weights of a phase while it is managed, for pipelines that compute a part in another dtype (SDXL decodes in float32)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from overflowml_core.errors import DoesNotFit, NearMiss, Unsupported
from overflowml_core.facts import Tier
from overflowml_core.layout import slab_offsets
from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.parts import is_plain, label
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.store import PackedStore
from overflowml_core.staging import likewise
from overflowml_core.units import ceil_size


@dataclass(frozen=True, slots=True)
class Cast:
    """The homes of a phase in one dtype."""

    residents: tuple[Home, ...]
    streamed: tuple[Home, ...]

    def staging_bytes(self, phase: PhasePlan) -> int:
        """Bytes of a staging buffer that holds as many of the streamed slabs at a time as the plan's does."""
        sizes = [place.stored_bytes for place in phase.streamed]
        return likewise(sizes, phase.staging_bytes, [home.slab.nbytes for home in self.streamed])


def cast_phase(present: Cast, dtype: torch.dtype, device: Device, open_store: Callable[[], PackedStore]) -> Cast:
    """The same weights in another dtype, where they float; what has it already stays as it is.

    Raises:
        Unsupported: weights live on the device alone, or are quantized.
        OverflowmlError: the packed store cannot be written.
    """
    if any(home.tier is Tier.DEVICE for home in (*present.residents, *present.streamed)):
        raise Unsupported(f"a cast to {dtype}: the weights have no home outside the device; load the model in {dtype}")
    for weight in (weight for home in (*present.residents, *present.streamed) for weight in home.slab.unit.weights):
        if not is_plain(weight.parameter):
            kind = label(weight.parameter)
            raise Unsupported(f"{weight.name}: a cast of a {kind} to {dtype}; leave the cast out, or quantize the model for {dtype}")

    def every(homes: Sequence[Home]) -> tuple[Home, ...]:
        return tuple(_cast_home(home, dtype, device, open_store) for home in homes)

    return Cast(every(present.residents), every(present.streamed))


def _cast_home(home: Home, dtype: torch.dtype, device: Device, open_store: Callable[[], PackedStore]) -> Home:
    if all(entry.dtype is dtype or not entry.dtype.is_floating_point for entry in home.slab.entries):
        return home
    slab = _cast_slab(home.slab, dtype)

    def cast(buffer: torch.Tensor) -> None:
        for entry, parameter in zip(slab.entries, home.parameters, strict=True):
            entry.view(buffer).copy_(parameter.detach())

    if home.host is not None:
        host = device.host_buffer(slab.nbytes, home.tier is Tier.PINNED)
        cast(host)
        return Home(slab, home.tier, _stand_ins(slab.entries, host, home), host=host)
    # Not kept: the homes are what the user sees of the weights, and may have been written to.
    packed = open_store().slab(slab.nbytes, cast)
    return Home(slab, home.tier, _stand_ins(slab.entries, packed.view, home), pieces=(packed.piece,))


def _stand_ins(entries: Iterable[Entry], data: torch.Tensor, home: Home) -> tuple[nn.Parameter, ...]:
    return tuple(
        nn.Parameter(entry.view(data), requires_grad=before.requires_grad) for entry, before in zip(entries, home.parameters, strict=True)
    )


def _cast_slab(slab: Slab, dtype: torch.dtype) -> Slab:
    dtypes = [dtype if entry.dtype.is_floating_point else entry.dtype for entry in slab.entries]
    sizes = [entry.nbytes // entry.dtype.itemsize * chosen.itemsize for entry, chosen in zip(slab.entries, dtypes, strict=True)]
    offsets, nbytes = slab_offsets(sizes)
    entries = tuple(
        Entry(entry.weight, offset, size, entry.shape, entry.stride, chosen, None)
        for entry, offset, size, chosen in zip(slab.entries, offsets, sizes, dtypes, strict=True)
    )
    return Slab(slab.unit, entries, nbytes)


def check_room(cast: Cast, phase: PhasePlan, budget_bytes: int, dtype: torch.dtype) -> None:
    """Hold a cast phase against the budget. What it grows by may take from what is kept for activations, where plans that foresee the cast
    count it.

    Raises:
        DoesNotFit: it takes more than the plan may.
    """
    held = sum(home.slab.nbytes for home in cast.residents) + cast.staging_bytes(phase)
    growth = max(held - (phase.device_bytes - phase.activation_bytes), 0)
    needed = held + max(phase.activation_bytes - growth, 0)
    if needed > budget_bytes:
        remedy = f"give overflow='{ceil_size(needed)}' or more, or load the pipeline in bfloat16"
        miss = NearMiss(f"{phase.name} in {dtype}", needed, budget_bytes, remedy)
        raise DoesNotFit(f"{phase.name}: in {dtype} it takes {needed} bytes, and the budget is {budget_bytes}; {remedy}", (miss,))
