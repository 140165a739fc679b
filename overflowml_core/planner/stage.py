"""From places to seconds: how a block comes from its home to the device on the rates of a machine. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.facts import Tier
from overflowml_core.machine import Machine, Rates
from overflowml_core.planner.machinery import Move
from overflowml_core.planner.pace import Stage

_PAGEABLE_SHARE = 0.6
"""Of the pinned rate, where nobody measured copies from pageable RAM: an RTX 4090 on PCIe 4 copies 13 to 18 GB/s of 24 to 26."""

_LARGEST_WINDOW_BYTES = 256 * 2**20
"""Of one read of the disk tier; the runtime's ring buffers are as large as the largest slot, and no larger than this."""


def rates_of(machine: Machine, device: int = 0) -> Rates:
    """Rates of a device by its place, with the machine's disk where it names none."""
    own = machine.rates_of(device)
    return own if own.disk_bytes_per_s > 0 else replace(own, disk_bytes_per_s=machine.rates.disk_bytes_per_s)


def pageable_bytes_per_s(rates: Rates) -> float:
    """Copies from pageable RAM to the device, a share of the pinned rate where nobody measured them."""
    return rates.pageable_h2d_bytes_per_s or rates.h2d_bytes_per_s * _PAGEABLE_SHARE


def move_of(nbytes: int, tier: Tier, rates: Rates, slot_bytes: int, in_ram: bool) -> Move | None:
    """How a block comes into its slot; None where a rate that it needs is not known."""
    if tier is Tier.DISK:
        if rates.disk_bytes_per_s <= 0 or (rates.h2d_bytes_per_s <= 0 and not in_ram):
            return None
        disk_s = nbytes / rates.disk_bytes_per_s
        if in_ram:
            return Move(0.0, disk_s, nbytes=nbytes)
        windows = -(-nbytes // max(1, min(slot_bytes, _LARGEST_WINDOW_BYTES))) or 1
        return Move(nbytes / rates.h2d_bytes_per_s, disk_s, windows, nbytes=nbytes)
    if rates.h2d_bytes_per_s <= 0:
        return None
    if tier is Tier.RAM:
        return Move(nbytes / pageable_bytes_per_s(rates), holds_reader=True, nbytes=nbytes)
    return Move(nbytes / rates.h2d_bytes_per_s, nbytes=nbytes)


def switch_seconds(nbytes_by_tier: dict[Tier, int], rates: Rates, in_ram: bool) -> float | None:
    """What bringing in so many bytes from each tier takes, one after the other; None where a rate is not known.

    What comes from disk crosses the link behind its reader, so that the slower of both sets its time.
    """
    total_s = 0.0
    for tier, nbytes in nbytes_by_tier.items():
        if tier is Tier.DEVICE or not nbytes:
            continue
        move = move_of(nbytes, tier, rates, nbytes, in_ram)
        if move is None:
            return None
        total_s += max(move.link_s, move.disk_s)
    return total_s


def stage_of(
    sizes_bytes: Sequence[int],
    tiers: Sequence[Tier],
    staging: tuple[int, int],
    rates: Rates,
    in_ram: bool,
    cache: dict[object, Move | None],
) -> Stage | None:
    """The stage of blocks on one device.

    Args:
        sizes_bytes: per block; 0 where it is tied to another.
        tiers: per block: DEVICE where it is resident, else where it is streamed from.
        staging: bytes of the staging buffer, and of its largest slot.
        rates: of the device.
        in_ram: the compute tier is RAM.
        cache: of moves by bytes and tier, for rates and slots that stay the same.

    Returns:
        None where a rate is not known.
    """
    staging_bytes, slot_bytes = staging
    slots_of: list[tuple[int, int] | None] = [None] * len(sizes_bytes)
    moves: list[Move] = []
    for index, (nbytes, tier) in enumerate(zip(sizes_bytes, tiers, strict=True)):
        if tier is Tier.DEVICE or not nbytes:
            continue
        key = (nbytes, tier, slot_bytes if tier is Tier.DISK else 0)
        if key not in cache:
            cache[key] = move_of(nbytes, tier, rates, slot_bytes, in_ram)
        move = cache[key]
        if move is None:
            return None
        slots_of[index] = (0, len(moves))
        moves.append(move)
    return Stage(tuple(slots_of), (tuple(moves),), staging_bytes, in_ram=in_ram)
