"""What running models in the host taught: seconds of their operations, the pace of the host's own copies, and what passes really hold.

Reads and gives frozen values; where they are kept is others' business.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace

from overflowml_comfyui.measurement import Measurement
from overflowml_core.facts import Component, Machine, Network
from overflowml_core.machine import Rates
from overflowml_core.planner.cost import Costs
from overflowml_core.work import PassProfile, Work

_NOISE = 0.03
"""Corrections smaller than this are left out."""

_LEAST, _MOST = 0.02, 50.0
"""A pass is never taken for less or more than so many times what the machine's rates say: a machine that slept teaches nothing."""

_LEAST_PASSES = 2
"""The first pass of a run sets things up; a run of one teaches nothing."""

_CLEARLY_LONGER = 1.25
"""A pass that takes so many times as long as its arithmetic has waited for weights."""

_NEWEST = 5


def main_pass(component: Component) -> PassProfile | None:
    """The pass that a sampler repeats; None where nobody knows what it computes."""
    return max(component.profiles, key=lambda profile: profile.count, default=None)


def taught_rates(rates: Rates, component: Component, measured: Measurement, samples: int) -> Rates:
    """A device's rates with the seconds of a model's operations as its passes took them.

    Every operation takes the same share of what was measured as of what was reckoned: nobody timed them one by one.

    Args:
        rates: of the device, measured.
        component: what ran, with the passes that were planned.
        measured: one run, all of whose weights stayed on the device; else its seconds are not those of arithmetic.
        samples: images or videos in a pass as it was planned.

    Returns:
        The same rates where the run teaches nothing: of another size, streamed, too short, or as reckoned.
    """
    profile, pass_s = main_pass(component), measured.pass_s
    is_planned_one = measured.samples == samples and not measured.streamed_bytes and measured.passes >= _LEAST_PASSES
    if profile is None or not pass_s or not is_planned_one or not rates.measured:
        return rates
    costs, works = Costs(rates), _works(profile)
    spent = [costs.seconds((work,)) for work in works]
    reckoned_s = sum(one.total_s for one in spent if one is not None)
    if None in spent or not reckoned_s or not all(work.signature for work in works):
        return rates
    factor = min(max(pass_s / reckoned_s, _LEAST), _MOST)
    if abs(factor - 1) <= _NOISE:
        return rates
    seconds = {work.signature: one.total_s * factor / max(work.calls, 1) for work, one in zip(works, spent, strict=True) if one is not None}
    kept = {signature: known_s for signature, known_s in rates.op_seconds if signature not in seconds}
    return replace(rates, op_seconds=(*kept.items(), *seconds.items()))


def _works(profile: PassProfile) -> list[Work]:
    return [*profile.outside, *(work for block in profile.blocks for work in block.works)]


def link_bytes_per_s(rates: Rates, component: Component, measured: Measurement) -> float:
    """How fast the host brought weights in during a run; 0 where its arithmetic hid that, or is not known.

    Args:
        rates: of the device.
        component: what ran, with the passes that were planned.
        measured: one run.
    """
    profile, pass_s = main_pass(component), measured.pass_s
    if profile is None or not pass_s or not measured.streamed_bytes:
        return 0.0
    spent = Costs(rates).seconds(tuple(_works(profile)))
    if spent is None or pass_s < _CLEARLY_LONGER * spent.total_s:
        return 0.0
    return measured.streamed_bytes / pass_s


def with_host_links(machine: Machine, found_bytes_per_s: Iterable[float]) -> Machine:
    """The machine with copies to its device as fast as this host makes them: its engine is not ours, and need not reach what the link can.

    Args:
        machine: as detected and calibrated.
        found_bytes_per_s: what runs showed, the newest last.
    """
    newest = [rate for rate in found_bytes_per_s if rate > 0][-_NEWEST:]
    if not newest or not machine.accelerators:
        return machine
    rate = statistics.median(newest)
    known = replace(machine.rates_of(0), h2d_bytes_per_s=rate)
    first = replace(machine.accelerators[0], rates=known)
    return replace(machine, accelerators=(first, *machine.accelerators[1:]), rates=known)


def with_measured_peak(network: Network, component: Component, measured: Measurement | None) -> Network:
    """The network with what a pass was measured to hold beside weights, in place of what its shapes say; itself where nothing was counted.

    Args:
        network: as it was described.
        component: of it, what ran.
        measured: an earlier run at the same sizes.
    """
    held_bytes = None if measured is None else measured.activation_bytes
    if not held_bytes:
        return network
    main = main_pass(component)
    profiles = tuple(
        replace(one, activation_bytes=held_bytes, source="measured", note="") if one is main else one for one in component.profiles
    )
    known = replace(component, activation_bytes=held_bytes, activation_source="measured", profiles=profiles)
    return replace(network, components=tuple(known if one is component else one for one in network.components))
