"""Where a unit's weights are while they are not on the device, and how they get there.

A home always shows the true values: whoever reads ``module.weight`` outside a pass (``state_dict``, ``save_pretrained``) reads RAM or a
mapped file, never a staging slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from overflowml_core.errors import ReadFault
from overflowml_core.facts import Tier
from overflowml_core.loading import Origin
from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.kept_file import Seal
from overflowml_core.runtime.parts import Path as PartPath
from overflowml_core.runtime.parts import is_plain, parameter_over, refit
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.slab_content import content_of
from overflowml_core.runtime.source import fill, is_stored_as_is, pieces_of, stored_as_is, values_of
from overflowml_core.runtime.store import PackedStore


@dataclass(slots=True)
class Home:
    """The home of one slab.

    Attributes:
        slab: what lives here.
        tier: PINNED or RAM (``host`` holds the slab), DISK (``pieces`` say where it is read), DEVICE (nowhere else).
        parameters: one per weight, installed while the slab is not on the device.
        host: the slab in RAM.
        pieces: the slab in files.
        seal: holds what is read against its checksum the first time; None where there is none.
    """

    slab: Slab
    tier: Tier
    parameters: tuple[nn.Parameter, ...]
    host: torch.Tensor | None = None
    pieces: tuple[Piece, ...] = ()
    seal: Seal | None = None


class FileMaps:
    """Files mapped into memory copy-on-write: their pages are the page cache's, and writing to a tensor over them changes no file."""

    def __init__(self) -> None:
        self._maps: dict[Path, torch.Tensor] = {}

    def view(self, entry: Entry) -> torch.Tensor:
        """A weight that is stored as it is, as a tensor over its file.

        Raises:
            ReadFault: the file is gone or shorter than it was.
        """
        if entry.origin is None:
            raise ValueError(f"{entry.weight.name} has no origin")
        origin = entry.origin
        if not origin.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = self._map(origin)[origin.offset_bytes : origin.offset_bytes + origin.nbytes]
        if flat.numel() < origin.nbytes:
            # Pages behind the end of a file can be mapped, but whoever touches them dies of it.
            raise ReadFault(origin.path, origin.offset_bytes, origin.nbytes, flat.numel(), "the file ends there")
        # A mapped file starts on a page, a weight in it need not lie on a multiple of its element size.
        if flat.data_ptr() % entry.dtype.itemsize:
            flat = flat.clone()
        return torch.from_numpy(flat.numpy()).view(entry.dtype).view(entry.shape)

    def _map(self, origin: Origin) -> torch.Tensor:
        if origin.path not in self._maps:
            try:
                self._maps[origin.path] = torch.from_numpy(np.memmap(origin.path, dtype=np.uint8, mode="c"))
            except (OSError, ValueError) as error:  # ValueError: the file is empty
                raise ReadFault(origin.path, origin.offset_bytes, origin.nbytes, 0, str(error)) from error
        return self._maps[origin.path]


def original(entry: Entry, reader: FileReader, maps: FileMaps) -> torch.Tensor:
    """A weight as it is in its file, or as the model has it, in the dtype in which it is used: mapped where that is all there is to do.

    Raises:
        ReadFault: the file is gone or shorter than it was.
    """
    return maps.view(entry) if is_stored_as_is(entry) else values_of(entry, reader)


def home_in_ram(slab: Slab, device: Device, pin: bool, reader: FileReader) -> Home:
    """Bring a slab into RAM, page-locked if asked for; the unit's own tensors are let go one by one."""
    host = device.filled_buffer(slab.nbytes, pin, lambda buffer: fill(slab.entries, buffer, reader))
    parameters = rehome(slab, lambda entry: entry.view(host))
    return Home(slab, Tier.PINNED if pin else Tier.RAM, parameters, host=host)


def home_on_disk(slab: Slab, reader: FileReader, maps: FileMaps, open_store: Callable[[], PackedStore], recipe: str | None = None) -> Home:
    """Leave a slab in the model's own file where it can be used from there, else have the store hold it.

    Args:
        slab: what it is, and where its weights come from.
        reader: reads files of the model and of the store.
        maps: the model's files in memory.
        open_store: opens the store, which is not asked for before it is needed.
        recipe: what ``fill`` does to the weights on the way; see :func:`content_of`.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        OverflowmlError: the store cannot be written.
    """
    if stored_as_is(slab):
        pieces = tuple(pieces_of(slab))
        reader.hold(pieces)
        parameters = rehome(slab, maps.view)
        return Home(slab, Tier.DISK, parameters, pieces=pieces)
    if not slab.nbytes:
        return Home(slab, Tier.DISK, rehome(slab, lambda entry: entry.view(torch.empty(0, dtype=torch.uint8))))
    packed = open_store().slab(slab.nbytes, lambda buffer: fill(slab.entries, buffer, reader), content_of(slab, reader, recipe))
    parameters = rehome(slab, lambda entry: entry.view(packed.view))
    return Home(slab, Tier.DISK, parameters, pieces=(packed.piece,), seal=packed.seal)


def home_on_device(slab: Slab, arena: torch.Tensor, maps: FileMaps) -> Home:
    """A slab that stays on the device. What can be seen in a file is seen there, so that nothing of it is held twice."""
    parameters = rehome(slab, lambda entry: maps.view(entry) if is_stored_as_is(entry) else entry.view(arena))
    return Home(slab, Tier.DEVICE, parameters)


def rehome(slab: Slab, view: Callable[[Entry], torch.Tensor]) -> tuple[nn.Parameter, ...]:
    """The parameters that stand for a slab's weights outside the device.

    Args:
        slab: what they are.
        view: gives the memory of each entry there.
    """
    return tuple(_stand_in(weight.parameter, tensors) for weight, tensors in slab.tensors(view))


def _stand_in(parameter: nn.Parameter, tensors: dict[PartPath, torch.Tensor]) -> nn.Parameter:
    """The model's own parameter over other memory; a new one where it had none, or where it cannot say that it is on another device."""
    if parameter.is_meta:
        return parameter_over(parameter, tensors)
    elsewhere = any(tensor.device != parameter.device for tensor in tensors.values())
    stand_in = parameter_over(parameter, tensors) if elsewhere and not is_plain(parameter) else parameter
    # Even where another one stands in: this one shall let go of what it held.
    refit(parameter, tensors)
    return stand_in
