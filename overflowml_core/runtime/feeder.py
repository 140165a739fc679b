"""Brings slabs from their homes onto the device: from RAM in one copy, from disk through a ring of staging buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from overflowml_core.facts import Tier
from overflowml_core.runtime.chunks import DIRECT_ALIGNMENT_BYTES
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.file_layout import FileLayout, as_in_file
from overflowml_core.runtime.homes import Home
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.ring_layout import windows_of
from overflowml_core.runtime.slab import Slab
from overflowml_core.runtime.source import fill, stored_as_is, windows
from overflowml_core.staging import likewise

_RING_COUNT = 2
"""Two buffers: the disk fills one while the copy engine empties the other."""

LARGEST_WINDOW_BYTES = 64 * 2**20
"""Bytes of one read when whole slabs are brought in at load. Larger reads gain nothing: comfy-aimdo reads 64 MiB windows, and so do we."""


class Staged(NamedTuple):
    """Homes as their blocks lie in a staging buffer, what each takes of it, and what it takes itself, in bytes."""

    homes: list[Home]
    sizes_bytes: list[int]
    staging_bytes: int


class Feeder:
    """Moves bytes to the device in order. Its ring is taken on first use, since models that fit RAM never read from disk.

    On a device that computes in RAM, files are read straight to where they are needed, and there is no ring.
    """

    def __init__(self, device: Device, reader: FileReader, window_bytes: int) -> None:
        """Plan the ring.

        Args:
            device: where to.
            reader: where from.
            window_bytes: size of each ring buffer; the plan counts two of them as pinned.
        """
        self.device = device
        self.reader = reader
        self._window_bytes = max(window_bytes, 1)
        self._ring: list[tuple[torch.Tensor, Any]] = []
        self._turn = 0
        # The reader thread streams blocks while a phase switch may bring in residents; both use the ring.
        self._lock = threading.Lock()

    def staged(self, homes: Sequence[Home], staging_bytes: int, spare_bytes: int) -> Staged:
        """Homes as their blocks lie in a staging buffer: as in their files where that makes reads faster and there is room, else as slabs.

        Args:
            homes: of the blocks that pass through it, in order.
            staging_bytes: of the buffer at least.
            spare_bytes: what it may have in addition.
        """
        sizes = [home.slab.nbytes for home in homes]
        most = staging_bytes + spare_bytes
        if self.device.on_host and any(home.tier is Tier.DISK for home in homes):
            layouts = [self._layout_of(home) for home in homes]
            as_filed = [
                home if one is None else replace(home, slab=one.slab, pieces=one.pieces) for home, one in zip(homes, layouts, strict=True)
            ]
            for found in (as_filed, list(homes)):
                paged = [-(-home.slab.nbytes // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES for home in found]
                grown = likewise(sizes, staging_bytes, paged)
                # A block less at a time costs less than the page cache does.
                if grown <= most or 2 * max(paged) <= most:
                    return Staged(found, paged, min(grown, most))
        return Staged(list(homes), sizes, staging_bytes)

    def _layout_of(self, home: Home) -> FileLayout | None:
        if not self.device.on_host or home.tier is not Tier.DISK or not stored_as_is(home.slab):
            return None
        if not all(self.reader.reads_direct(piece.path) for piece in home.pieces):
            return None
        return as_in_file(home.slab)

    def feed(self, home: Home, target: torch.Tensor, after: Sequence[Any], done: Any) -> None:
        """Bring a slab from its home to the device.

        Args:
            home: in RAM or on disk.
            target: bytes on the device, at least as many as the slab has.
            after: events before which the target must not be written.
            done: event to record behind the last copy.

        Raises:
            ReadFault: a file is gone or shorter than it was.
            DamagedPack: a kept slab is not what was written.
        """
        if home.host is not None:
            self.device.copy(target[: home.slab.nbytes], home.host, after, done)
        elif self.device.on_host:
            self.reader.read(home.pieces, target)
            if home.seal is not None:
                home.seal.check(0, memoryview(target[: home.slab.nbytes].numpy()))
        else:
            self._through_ring(home, target, after)
            self.device.record_copies(done)

    def _through_ring(self, home: Home, target: torch.Tensor, after: Sequence[Any]) -> None:
        with self._lock:
            for window in windows_of(home.pieces, self._window_bytes):
                buffer, free = self._next_buffer()
                self.reader.read(window.pieces, buffer)
                for copy in window.copies:
                    source = buffer[copy.ring_offset : copy.ring_offset + copy.nbytes]
                    if home.seal is not None:
                        home.seal.check(copy.slab_offset, memoryview(source.numpy()))
                    self.device.copy(target[copy.slab_offset : copy.slab_offset + copy.nbytes], source, after, free)

    def _next_buffer(self) -> tuple[torch.Tensor, Any]:
        if not self._ring:
            self._ring = [(self.device.host_buffer(self._window_bytes, pin=True), self.device.new_event()) for _ in range(_RING_COUNT)]
        buffer, free = self._ring[self._turn]
        self._turn = (self._turn + 1) % _RING_COUNT
        # The copy that last left this buffer must be over before the disk may write into it.
        self.device.wait_on_host(free)
        return buffer, free

    def load(self, slab: Slab, target: torch.Tensor) -> None:
        """Bring a slab to the device from wherever its weights come from, waiting until it is there.

        Raises:
            ReadFault: a file is gone or shorter than it was.
            PlanMismatch: a weight has neither data nor an origin.
        """
        if self.device.on_host:
            fill(slab.entries, target, self.reader)
            return
        for first, last, entries in windows(slab.entries, LARGEST_WINDOW_BYTES):
            buffer = torch.empty(last - first, dtype=torch.uint8)
            fill(entries, buffer, self.reader, first)
            target[first:last].copy_(buffer)

    def close(self) -> None:
        """Let the ring go."""
        self._ring = []
