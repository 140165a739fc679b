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
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.slab import Entry, Slab
from overflowml_core.runtime.source import FileReader, Piece, fill, is_stored_as_is, pieces_of, stored_as_is
from overflowml_core.runtime.store import PackedStore


@dataclass(slots=True)
class Home:
    """The home of one slab.

    Attributes:
        slab: what lives here.
        tier: PINNED or RAM (``host`` holds the slab), DISK (``pieces`` say where it is read), DEVICE (nowhere else).
        parameters: one per entry, installed while the slab is not on the device.
        host: the slab in RAM.
        pieces: the slab in files.
    """

    slab: Slab
    tier: Tier
    parameters: tuple[nn.Parameter, ...]
    host: torch.Tensor | None = None
    pieces: tuple[Piece, ...] = ()


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


def home_in_ram(slab: Slab, device: Device, pin: bool, reader: FileReader) -> Home:
    """Bring a slab into RAM, page-locked if asked for; the unit's own tensors are let go one by one."""
    host = device.host_buffer(slab.nbytes, pin)
    fill(slab.entries, host, reader)
    parameters = tuple(rehome(entry, entry.view(host)) for entry in slab.entries)
    return Home(slab, Tier.PINNED if pin else Tier.RAM, parameters, host=host)


def home_on_disk(slab: Slab, reader: FileReader, maps: FileMaps, open_store: Callable[[], PackedStore]) -> Home:
    """Leave a slab in the model's own file where it can be used from there, else pack it into the store, which is opened then."""
    if stored_as_is(slab):
        pieces = tuple(pieces_of(slab))
        reader.hold(pieces)
        parameters = tuple(rehome(entry, maps.view(entry)) for entry in slab.entries)
        return Home(slab, Tier.DISK, parameters, pieces=pieces)
    store = open_store()
    packed = torch.empty(slab.nbytes, dtype=torch.uint8)
    fill(slab.entries, packed, reader)
    piece = store.append(packed)
    if not slab.nbytes:
        return Home(slab, Tier.DISK, tuple(rehome(entry, entry.view(packed)) for entry in slab.entries))
    mapped = store.mapped(piece)
    parameters = tuple(rehome(entry, entry.view(mapped)) for entry in slab.entries)
    return Home(slab, Tier.DISK, parameters, pieces=(piece,))


def home_on_device(slab: Slab, arena: torch.Tensor, maps: FileMaps) -> Home:
    """A slab that stays on the device. What can be seen in a file is seen there, so that nothing of it is held twice."""
    parameters = tuple(rehome(entry, maps.view(entry) if is_stored_as_is(entry) else entry.view(arena)) for entry in slab.entries)
    return Home(slab, Tier.DEVICE, parameters)


def rehome(entry: Entry, data: torch.Tensor) -> nn.Parameter:
    """The parameter that stands for a weight outside the device: the model's own with other data, or a new one where it had none."""
    parameter = entry.weight.parameter
    if parameter.is_meta:
        with torch.inference_mode(False):
            return nn.Parameter(data, requires_grad=parameter.requires_grad)
    parameter.data = data
    return parameter
