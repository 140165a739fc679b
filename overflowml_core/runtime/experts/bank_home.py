"""Where the experts of a bank wait outside the device, and how the model sees them meanwhile: always with their true values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from overflowml_core.facts import Tier
from overflowml_core.loading import Loading
from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.bank import Bank
from overflowml_core.runtime.experts.record import as_in_file, records_of, stacked_view
from overflowml_core.runtime.homes import FileMaps, Home
from overflowml_core.runtime.parts import parameter_over, refit
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Slab, lay_out
from overflowml_core.runtime.slab_content import content_of
from overflowml_core.runtime.source import fill, is_straight, pieces_of, values_of
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.structure import Unit


@dataclass(slots=True)
class BankHome:
    """The home of one bank.

    Attributes:
        bank: whose experts.
        tier: where they wait.
        homes: of each expert, for a feeder.
        record_bytes: from one expert to the next where they are records.
        reader: reads what lies in files.
        records: the bytes of all records in RAM or mapped from the packed store; None where experts are read from the model's own files.
        parameters: what stands for each weight of the bank in the module.
        before: device of each weight as the model had it.
    """

    bank: Bank
    tier: Tier
    homes: list[Home]
    record_bytes: int
    reader: FileReader
    records: torch.Tensor | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    before: list[torch.device] = field(default_factory=list)
    slabs: list[Slab] = field(default_factory=list)
    """As the records would lie in RAM; for reading whole weights."""
    is_converted: bool = False
    """Records are made from the weights, which stay what they are: what somebody writes into them does not reach the records."""
    hook: Any = None
    """Of the module's states."""

    def show(self, views: Sequence[torch.Tensor | None]) -> None:
        """Have the module hold these tensors for its weights.

        Where there is none the weight stays without data. States show tensors of their own, read or copied when they are asked for: hosts
        save none that lie between others.
        """
        self.before = [weight.parameter.device for weight in self.bank.weights]
        for weight, view in zip(self.bank.weights, views, strict=True):
            parameter = weight.parameter
            if view is None:
                stand_in = parameter
            elif parameter.is_meta or parameter.device != view.device:
                stand_in = parameter_over(parameter, {(): view})
                if not parameter.is_meta:
                    refit(parameter, {(): torch.empty_like(parameter, device=parameter.device).resize_(0)})
            else:
                refit(parameter, {(): view})
                stand_in = parameter
            self._install(len(self.parameters), stand_in)
            self.parameters.append(stand_in)
        if self.bank.is_stacked or self.unread_bytes:
            self.hook = self.bank.module.register_state_dict_post_hook(partial(self._complete))

    def _install(self, number: int, parameter: nn.Parameter) -> None:
        owner = self.bank.weights[number].owners[0]
        owner.module._parameters[owner.attribute] = parameter

    def _complete(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        if self.bank.is_stacked:
            names = list(self.bank.attributes)
        else:
            names = [weight.name.removeprefix(f"{self.bank.name}.") for weight in self.bank.weights]
        for number, own in enumerate(names):
            name = f"{prefix}{own}"
            if name in state and (state[name].is_meta or not state[name].is_contiguous()):
                state[name] = self.values(number)

    def values(self, number: int) -> torch.Tensor:
        """A weight of the bank, in memory of its own on the CPU.

        Raises:
            ReadFault: its file is gone or shorter than it was.
        """
        shown = self.parameters[number]
        if not shown.is_meta:
            return shown.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if not self.bank.is_stacked:
            expert, place = divmod(number, len(self.bank.attributes))
            return values_of(self.slabs[expert].entries[place], self.reader)
        target = torch.empty(shown.shape, dtype=shown.dtype)
        flat = target.view(-1).view(torch.uint8)
        step = flat.numel() // self.bank.count
        fill([replace(slab.entries[number], offset_bytes=e * step) for e, slab in enumerate(self.slabs)], flat, self.reader)
        return target

    @property
    def unread_bytes(self) -> int:
        """Of the weights that the module holds without data, for no mapped file can show them."""
        return sum(shown.nbytes for shown in self.parameters if shown.is_meta)

    def give_back(self, reads: bool = True) -> None:
        """Let the module hold plain weights again, where they were. What is seen in the model's own file stays there.

        Args:
            reads: read the weights that are held without data; else they stay so.
        """
        if self.hook is not None:
            self.hook.remove()
        if not reads and self.unread_bytes:
            return
        for number, (weight, shown) in enumerate(zip(self.bank.weights, self.parameters, strict=True)):
            device = self.before[number]
            if self.records is None and not shown.is_meta:
                if self.is_converted and not weight.parameter.is_meta and shown.device != device:
                    shown.data = shown.data.to(device)  # it waited in RAM
                continue
            values = self.values(number).to("cpu" if device.type == "meta" else device)
            if weight.parameter.is_meta:
                self._install(number, parameter_over(weight.parameter, {(): values}))
            else:
                refit(weight.parameter, {(): values})
                self._install(number, weight.parameter)

    @property
    def version(self) -> int:
        """Changes whenever somebody writes into a weight in place."""
        return sum(parameter._version for parameter in self.parameters if not parameter.is_meta)


def bank_in_ram(bank: Bank, device: Device, pin: bool, loading: Loading | None, reader: FileReader) -> BankHome:
    """Bring all experts of a bank into RAM, each as one record, page-locked if asked for.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        PlanMismatch: a weight has neither data nor an origin.
    """
    slabs, size = records_of(bank, loading), bank.record_bytes
    records = device.filled_buffer(size * bank.count, pin, lambda buffer: _fill(bank, slabs, size, buffer, reader))
    tier = Tier.PINNED if pin else Tier.RAM
    homes = [Home(slab, tier, (), host=records[e * size : (e + 1) * size]) for e, slab in enumerate(slabs)]
    home = BankHome(bank, tier, homes, size, reader, records)
    home.show(_views(bank, slabs, size, records))
    return home


def bank_on_disk(
    bank: Bank, device: Device, loading: Loading | None, reader: FileReader, maps: FileMaps, open_store: Callable[[], PackedStore]
) -> BankHome:
    """Leave the experts of a bank in the model's own files where they can be used from there, else have the store hold their records.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        OverflowmlError: the store cannot be written.
    """
    slabs, size = records_of(bank, loading), bank.record_bytes
    if all(is_straight(entry) for slab in slabs for entry in slab.entries):
        homes = [_home_in_file(slab, device, reader) for slab in slabs]
        home = BankHome(bank, Tier.DISK, homes, size, reader, slabs=slabs)
        whole = lay_out(Unit(bank.name, None, bank.weights), loading).entries
        home.show([maps.view(entry) if entry.origin is not None else None for entry in whole])
        return home
    everything = bank_slab(bank, slabs, size)
    packed = open_store().slab(everything.nbytes, lambda buffer: _fill(bank, slabs, size, buffer, reader), content_of(everything, reader))
    base = packed.piece
    homes = [Home(slab, Tier.DISK, (), pieces=(Piece(base.path, base.file_offset + e * size, 0, size),)) for e, slab in enumerate(slabs)]
    home = BankHome(bank, Tier.DISK, homes, size, reader, packed.view)
    home.show(_views(bank, slabs, size, packed.view))
    return home


def _home_in_file(slab: Slab, device: Device, reader: FileReader) -> Home:
    pieces = tuple(pieces_of(slab))
    reader.hold(pieces)
    if device.on_host and pieces and reader.reads_direct(pieces[0].path):
        placed = as_in_file(slab, reader.status(pieces[0].path).st_size)
        if placed is not None:
            return Home(placed[0], Tier.DISK, (), pieces=(placed[1],))
    return Home(slab, Tier.DISK, (), pieces=pieces)


def bank_slab(bank: Bank, slabs: Sequence[Slab], size: int) -> Slab:
    """All records of a bank as one slab, which the store keeps as a whole.

    Args:
        bank: whose experts.
        slabs: of each expert.
        size: bytes from one record to the next.
    """
    entries = tuple(
        replace(entry, offset_bytes=expert * size + entry.offset_bytes) for expert, slab in enumerate(slabs) for entry in slab.entries
    )
    return Slab(Unit(bank.name, None, bank.weights), entries, size * bank.count)


def _fill(bank: Bank, slabs: Sequence[Slab], size: int, buffer: torch.Tensor, reader: FileReader) -> None:
    """Bring all records of a bank into a buffer."""
    entries = bank_slab(bank, slabs, size).entries
    # A stack with data is not the data of one expert, which is what an entry without an origin stands for.
    live = [e for e in entries if bank.is_stacked and not e.weight.parameter.is_meta]
    fill([e for e in entries if not (bank.is_stacked and not e.weight.parameter.is_meta)], buffer, reader)
    with torch.no_grad():
        for entry in live:
            entry.view(buffer).copy_(entry.weight.parameter[entry.offset_bytes // size])


def _views(bank: Bank, slabs: Sequence[Slab], size: int, records: torch.Tensor) -> list[torch.Tensor | None]:
    if bank.is_stacked:
        return [stacked_view(records, size, entry, bank.count) for entry in slabs[0].entries]
    return [entry.view(records[e * size : (e + 1) * size]) for e, slab in enumerate(slabs) for entry in slab.entries]
