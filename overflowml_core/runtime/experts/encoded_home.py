"""The home of a bank whose experts are in a format: records of converted experts, and the true weights, which the model shows."""

from __future__ import annotations

from collections.abc import Callable

from overflowml_core.facts import Tier
from overflowml_core.loading import Loading
from overflowml_core.runtime.chunks import Piece
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.bank import Bank
from overflowml_core.runtime.experts.bank_home import BankHome, bank_slab
from overflowml_core.runtime.experts.encoded import encoded_records, fill_encoded
from overflowml_core.runtime.experts.record import records_of
from overflowml_core.runtime.homes import FileMaps, Home
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.slab import Slab, lay_out
from overflowml_core.runtime.slab_content import content_of
from overflowml_core.runtime.source import is_stored_as_is
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.structure import Unit


def encoded_in_ram(bank: Bank, device: Device, pin: bool, loading: Loading | None, reader: FileReader, maps: FileMaps) -> BankHome:
    """Convert all experts of a bank into RAM, each as one record, page-locked if asked for.

    Raises:
        ReadFault: a file is gone or shorter than it was.
        PlanMismatch: a weight has neither data nor an origin, or the codec makes other parts than the planner was told.
    """
    plain, size = records_of(bank, loading), bank.record_bytes
    slabs, before = encoded_records(bank, plain), [weight.parameter.device for weight in bank.weights]
    records = device.filled_buffer(size * bank.count, pin, lambda buffer: fill_encoded(bank, slabs, buffer, reader))
    tier = Tier.PINNED if pin else Tier.RAM
    homes = [Home(slab, tier, (), host=records[e * size : (e + 1) * size]) for e, slab in enumerate(slabs)]
    home = BankHome(bank, tier, homes, size, reader, slabs=plain, is_converted=True)
    _show_true(home, loading, maps)
    home.before = before
    return home


def encoded_on_disk(
    bank: Bank, loading: Loading | None, reader: FileReader, maps: FileMaps, open_store: Callable[[], PackedStore]
) -> BankHome:
    """Have the store hold the converted experts of a bank, which converts nothing that it has already.

    Raises:
        ReadFault, PlanMismatch: as for :func:`encoded_in_ram`.
        OverflowmlError: the store cannot be written.
    """
    plain, size = records_of(bank, loading), bank.record_bytes
    slabs, before = encoded_records(bank, plain), [weight.parameter.device for weight in bank.weights]
    whole = bank_slab(bank, slabs, size)
    packed = open_store().slab(whole.nbytes, lambda buffer: fill_encoded(bank, slabs, buffer, reader), content_of(whole, reader))
    homes = [Home(slab, Tier.DISK, (), pieces=(_piece(packed.piece, slab, e),)) for e, slab in enumerate(slabs)]
    home = BankHome(bank, Tier.DISK, homes, size, reader, slabs=plain, is_converted=True)
    _show_true(home, loading, maps)
    home.before = before
    return home


def _piece(base: Piece, slab: Slab, expert: int) -> Piece:
    return Piece(base.path, base.file_offset + expert * slab.nbytes, 0, slab.nbytes)


def _show_true(home: BankHome, loading: Loading | None, maps: FileMaps) -> None:
    """Weights of files are seen there where a mapped file can show them; those of a live model are the model's own."""
    entries = lay_out(Unit(home.bank.name, None, home.bank.weights), loading).entries
    home.show([maps.view(entry) if is_stored_as_is(entry) else None for entry in entries])
