"""Weights that change after a plan was attached: their homes follow, and those that are no longer the plan's are let go.

Note [what is seen]. A home in RAM is edited in place and streamed from there. A home on disk is a copy-on-write map of a file that is read
again on the next pass: an edited unit gets a home in the packed store instead. Fusing adapters passes through :meth:`Edits.open`;
``parameter.data = other`` and in-place operations are noticed before the next pass, by the data's address and by torch's own count of
versions. What is written through ``parameter.data`` into a map is counted by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from operator import attrgetter

import torch

from overflowml_core.facts import Tier
from overflowml_core.runtime.homes import FileMaps, Home, home_on_disk
from overflowml_core.runtime.parts import parts_of, refit
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.rearrange import Held
from overflowml_core.runtime.slab import Slab, lay_out
from overflowml_core.runtime.store import PackedStore

Place = tuple[int, str]
"""An owner of a parameter: id of the module, and the attribute."""

_ADDRESS, _VERSION = torch.Tensor.data_ptr, attrgetter("_version")


class Edits:
    """Follows what is done to the weights of all units."""

    def __init__(self, reader: FileReader, maps: FileMaps, open_store: Callable[[], PackedStore]) -> None:
        self._reader = reader
        self._maps = maps
        self._open_store = open_store
        self._open: tuple[Held, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether units wait for their homes."""
        return bool(self._open)

    def open(self, units: Sequence[Held]) -> None:
        """Let units be edited, whose weights are at home. Those that were open before are closed, so that RAM never holds more of them.

        Raises:
            OverflowmlError: the packed store has no room for what was open.
        """
        if all(any(unit is other for other in self._open) for unit in units):
            return
        self.close()
        for unit in units:
            if unit.home.tier is Tier.DISK:
                # Pages of a map that are written to would stay in memory until the map goes.
                for parameter in unit.home.parameters:
                    refit(parameter, {part.path: part.tensor.detach().clone() for part in parts_of(parameter)})
        self._open = tuple(units)

    def close(self) -> None:
        """Give the open units their homes. A second call does nothing.

        Raises:
            OverflowmlError: the packed store has no room.
        """
        units, self._open = self._open, ()
        for unit in units:
            self.settle(unit)

    def settle(self, unit: Held) -> None:
        """Make what the weights of a unit at home show now its home.

        Raises:
            OverflowmlError: the packed store has no room.
        """
        home = unit.home
        if home.tier is Tier.DISK:
            # What the parameters hold, not what the files do: so no weight has an origin.
            made = home_on_disk(lay_out(_as_shown(unit).unit, None), self._reader, self._maps, self._open_store)
            for field in fields(Home):
                # The object stays: streamers and phases know it.
                setattr(home, field.name, getattr(made, field.name))
            unit.slab = made.slab
            return
        buffer = unit.arena if unit.arena is not None else home.host
        if buffer is not None:
            _write(unit, buffer)

    def let_go(self, unit: Held, places: set[Place]) -> None:
        """Leave it to whoever took over these places to keep them; a weight without a place is no longer the unit's."""
        weights = unit.slab.unit.weights
        kept = [tuple(o for o in w.owners if (id(o.module), o.attribute) not in places) for w in weights]
        if all(len(owners) == len(w.owners) for owners, w in zip(kept, weights, strict=True)):
            return
        changed = {id(w): replace(w, owners=owners) for owners, w in zip(kept, weights, strict=True) if owners}
        entries = tuple(replace(e, weight=changed[id(e.weight)]) for e in unit.slab.entries if id(e.weight) in changed)
        slab = Slab(replace(unit.slab.unit, weights=tuple(changed.values())), entries, unit.slab.nbytes)
        stay = [bool(owners) for owners in kept]
        unit.home.parameters = tuple(p for p, stays in zip(unit.home.parameters, stay, strict=True) if stays)
        unit.devices = tuple(d for d, stays in zip(unit.devices, stay, strict=True) if stays)
        unit.slab = unit.home.slab = slab


class Marks:
    """Where the weights of some homes are, to see later whether they were edited."""

    def __init__(self, homes: Iterable[Home]) -> None:
        self._homes = tuple(homes)
        self._watched = [p for home in self._homes for p in home.parameters]
        self._on_disk = [p for home in self._homes if home.tier is Tier.DISK for p in home.parameters]
        self._addresses = [p.data_ptr() for p in self._watched]
        self._versions = [p._version for p in self._on_disk]

    @property
    def seen(self) -> bool:
        """Whether a weight is elsewhere by now, or one on disk was edited. Asked on every pass; costs 0.1 to 0.2 us a weight."""
        # Mapped: a quarter faster than a comprehension, and there are thousands of weights.
        return list(map(_ADDRESS, self._watched)) != self._addresses or list(map(_VERSION, self._on_disk)) != self._versions

    def seen_in(self) -> list[Home]:
        """The homes in which something was seen."""
        addresses = {id(p): address for p, address in zip(self._watched, self._addresses, strict=True)}
        versions = {id(p): version for p, version in zip(self._on_disk, self._versions, strict=True)}
        return [
            home
            for home in self._homes
            if any(p.data_ptr() != addresses.get(id(p)) or versions.get(id(p), p._version) != p._version for p in home.parameters)
        ]


def _as_shown(unit: Held) -> Slab:
    """The slab of a unit with the parameters that stand for its weights at home for their only source."""
    slab = unit.slab
    changed = {id(w): replace(w, parameter=p) for w, p in zip(slab.unit.weights, unit.home.parameters, strict=True)}
    entries = tuple(replace(entry, weight=changed[id(entry.weight)], origin=None, scattered=()) for entry in slab.entries)
    return Slab(replace(slab.unit, weights=tuple(changed.values())), entries, slab.nbytes)


def _write(unit: Held, buffer: torch.Tensor) -> None:
    """Copy into a unit's buffer what its weights hold elsewhere, and have them show it there."""
    slab = _as_shown(unit)
    for (weight, entries), at_home in zip(slab.by_weight(), unit.home.parameters, strict=True):
        owner = weight.owners[0]
        present = owner.module._parameters[owner.attribute]
        shown = at_home if unit.arena is None or present is None else present
        views = {entry.path: entry.view(buffer) for entry in entries}
        for part in parts_of(shown):
            if part.tensor.data_ptr() != views[part.path].data_ptr():
                views[part.path].copy_(part.tensor.detach())
        refit(shown, views)
        refit(at_home, views)
    unit.slab = unit.home.slab = slab
