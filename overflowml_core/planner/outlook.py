"""What another machine would buy: the same request planned again with a larger card, more RAM or a faster link."""

from __future__ import annotations

from dataclasses import replace

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.formats import Format
from overflowml_core.machine import Accelerator, Rates
from overflowml_core.plan import Plan, WhatIf
from overflowml_core.planner.search import make_plan
from overflowml_core.units import format_bytes, parse_bytes

_CARD_SIZES = tuple(parse_bytes(f"{size}GiB") for size in (8, 12, 16, 24, 32, 48, 64, 80, 96, 141, 192, 288))
"""Sizes of memory in which cards are common, from desktop cards to the largest of data centres."""

_MOST_CARDS = 2
_SAME = 1e-3


def with_outlook(
    plan: Plan,
    network: Network,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    formats: tuple[Format, ...] = (),
    abilities: frozenset[str] = frozenset(),
) -> Plan:
    """The plan with what other machines would buy; several times as slow as making it. Arguments as for ``make_plan``."""
    return replace(plan, outlook=what_if(network, machine, workload, limits, formats, abilities, plan))


def what_if(
    network: Network,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    formats: tuple[Format, ...],
    abilities: frozenset[str],
    plan: Plan,
) -> tuple[WhatIf, ...]:
    """What would change with the next two common sizes of card, with twice the RAM, and over a link twice as fast.

    A larger card has all else of the present one, and the budget that was asked for is lifted, or it would buy nothing. Changes that buy
    nothing
    are left out: those with the same strategy and the same time.
    """
    found = []
    for change, other, granted in _changes(machine, limits):
        try:
            there = make_plan(network, other, workload, granted, formats, abilities)
        except DoesNotFit:
            continue
        answer = WhatIf(change, there.strategy, there.estimate.total_s, there.estimate.device_peak_bytes)
        if _differs(answer, plan):
            found.append(answer)
    return tuple(found)


def _differs(answer: WhatIf, plan: Plan) -> bool:
    now_s = plan.estimate.total_s
    if answer.strategy != plan.strategy or answer.total_s is None or now_s is None:
        return answer.strategy != plan.strategy or answer.total_s is not now_s
    return abs(answer.total_s - now_s) > _SAME * now_s


def _changes(machine: Machine, limits: Limits) -> list[tuple[str, Machine, Limits]]:
    changes = []
    host = machine.host
    if machine.accelerators and not machine.accelerators[0].unified:
        card, *others = machine.accelerators
        lifted = replace(limits, device_memory=None)
        for size in [size for size in _CARD_SIZES if size > card.total_bytes][:_MOST_CARDS]:
            larger = replace(card, total_bytes=size, free_bytes=card.free_bytes + size - card.total_bytes)
            changes.append((f"a card with {format_bytes(size)}", replace(machine, accelerators=(larger, *others)), lifted))
        faster = _with_link(machine, card)
        changes.append(("a link twice as fast", faster, limits))
    doubled = replace(
        host,
        total_bytes=2 * host.total_bytes,
        available_bytes=host.available_bytes + host.total_bytes,
        pinnable_bytes=host.pinnable_bytes + host.total_bytes // 2,
    )
    more = replace(machine, host=doubled)
    if machine.compute.unified and machine.accelerators:
        card = machine.accelerators[0]
        larger = replace(card, total_bytes=2 * card.total_bytes, free_bytes=card.free_bytes + card.total_bytes)
        more = replace(more, accelerators=(larger, *machine.accelerators[1:]))
    in_ram = machine.compute.unified
    unbound = replace(limits, host_memory=None, device_memory=None if in_ram else limits.device_memory)
    changes.append((f"{format_bytes(2 * host.total_bytes)} of RAM", more, unbound))
    return changes


def _with_link(machine: Machine, card: Accelerator) -> Machine:
    def faster(rates: Rates) -> Rates:
        return replace(
            rates,
            h2d_bytes_per_s=2 * rates.h2d_bytes_per_s,
            d2h_bytes_per_s=2 * rates.d2h_bytes_per_s,
            pageable_h2d_bytes_per_s=2 * rates.pageable_h2d_bytes_per_s,
            pageable_d2h_bytes_per_s=2 * rates.pageable_d2h_bytes_per_s,
        )

    quick = replace(card, rates=None if card.rates is None else faster(card.rates))
    return replace(machine, accelerators=(quick, *machine.accelerators[1:]), rates=faster(machine.rates))
