"""Why a plan is as it is, and why there is none, in sentences with numbers. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from overflowml_core.errors import DoesNotFit, NearMiss
from overflowml_core.facts import Component, Limits, Machine, Tier
from overflowml_core.plan import Estimate, PhasePlan, Rejected
from overflowml_core.planner.homes import Draft
from overflowml_core.planner.memory import PhaseNeed, together_bytes
from overflowml_core.units import ceil_size, format_bytes

_STRATEGIES = ("direct", "phased", "stream")


def sentences(drafts: Sequence[Draft], phases: Sequence[PhasePlan], machine: Machine, limits: Limits) -> tuple[str, ...]:
    """What was decided for each phase, and how sure its numbers are."""
    found: list[str] = []
    for draft, phase in zip(drafts, phases, strict=True):
        found += _residency_sentences(draft, phase)
    found += _activation_sentences(drafts, limits)
    found += _disk_sentences(drafts, phases, machine)
    if any(phase.streamed for phase in phases):
        rates = machine.rates
        h2d, disk = (f"{format_bytes(round(rate))}/s" for rate in (rates.h2d_bytes_per_s, rates.disk_bytes_per_s))
        known = "measured" if rates.measured else "assumed, not measured"
        link = "" if machine.compute.unified else f"{h2d} to the device and "
        found.append(f"transfer times rest on {known} rates: {link}{disk} from disk")
    return tuple(found)


def _residency_sentences(draft: Draft, phase: PhasePlan) -> Iterator[str]:
    if not phase.streamed:
        return
    for component in phase.components:
        own = [p for p in phase.placements if p.component == component]
        streamed = [p for p in own if p.tier is not Tier.DEVICE]
        if streamed:
            nbytes = format_bytes(sum(p.stored_bytes for p in streamed))
            yield f"{component}: {len(own) - len(streamed)} of {len(own)} blocks resident, {len(streamed)} streamed ({nbytes} per pass)"
    slot = format_bytes(phase.slot_bytes)
    if phase.slot_count == 1:
        yield f"{phase.name}: one slot of {slot}, for two leave too little room: copies wait for the streamed block before them"


def _activation_sentences(drafts: Sequence[Draft], limits: Limits) -> Iterator[str]:
    if limits.reserve_bytes is not None:
        yield f"activations: {format_bytes(limits.reserve_bytes)} kept free in every phase, as asked"
        return
    components = [component for draft in drafts for component in draft.need.components]
    for source, words in (("analytic", "an analytic estimate"), ("measured", "measured")):
        known = [c for c in components if c.activation_source == source]
        if known:
            yield f"activations: {words} for {_amounts(known)}"
    unknown = [c.name for c in components if c.activation_source not in ("analytic", "measured")]
    if unknown:
        yield f"activations: nobody knows those of {', '.join(unknown)}; keep room for them with a reserve"


def _amounts(components: Sequence[Component]) -> str:
    return ", ".join(f"{component.name} ({format_bytes(component.activation_bytes)})" for component in components)


def _disk_sentences(drafts: Sequence[Draft], phases: Sequence[PhasePlan], machine: Machine) -> Iterator[str]:
    disk_bytes = sum(phase.estimate.disk_bytes for phase in phases)
    if disk_bytes > machine.disk_free_bytes:
        yield (
            f"disk: {format_bytes(disk_bytes)} are read from it and {format_bytes(machine.disk_free_bytes)} are free; "
            "that is enough only where the model's own files can be read as they are"
        )
    if machine.compute.unified:
        return
    for draft, phase in zip(drafts, phases, strict=True):
        if not any(p.tier is Tier.DISK for p in phase.streamed):
            continue
        blocks = sum(p.stored_bytes for p in phase.placements if p.home is Tier.PINNED)
        fixed = draft.need.fixed_bytes if phase.fixed_home is Tier.PINNED else 0
        ring_bytes = phase.estimate.pinned_bytes - blocks - fixed
        if ring_bytes:
            yield f"{phase.name}: blocks from disk pass through {format_bytes(ring_bytes)} of pinned RAM"
        else:
            yield f"{phase.name}: blocks from disk pass through pageable RAM, because none is left to pin"


def rejected(strategy: str, needs: Sequence[PhaseNeed], device_bytes: int) -> tuple[Rejected, ...]:
    """Every strategy that was not chosen, and why."""
    return tuple(_rejected(other, strategy, needs, device_bytes) for other in _STRATEGIES if other != strategy)


def _rejected(other: str, strategy: str, needs: Sequence[PhaseNeed], device_bytes: int) -> Rejected:
    if other == "direct":
        together = together_bytes(needs)
        return Rejected(other, f"needs {_of(together, device_bytes)}", Estimate(device_peak_bytes=together))
    if other == "stream":
        largest_bytes = max((need.whole_bytes for need in needs), default=0)
        why = (
            _not_needed(needs, device_bytes)
            if strategy == "direct"
            else f"not needed: each phase takes at most {_of(largest_bytes, device_bytes)}"
        )
        return Rejected(other, why)
    if strategy == "direct":
        return Rejected(other, _not_needed(needs, device_bytes))
    if len(needs) == 1:
        return Rejected(other, f"there is one phase, {needs[0].name}, and it needs {_of(needs[0].whole_bytes, device_bytes)}")
    largest = max(needs, key=lambda need: need.whole_bytes)
    return Rejected(
        other, f"{largest.name} alone needs {_of(largest.whole_bytes, device_bytes)}", Estimate(device_peak_bytes=largest.whole_bytes)
    )


def _not_needed(needs: Sequence[PhaseNeed], device_bytes: int) -> str:
    return f"not needed: everything together takes {_of(together_bytes(needs), device_bytes)}"


def _of(nbytes: int, device_bytes: int) -> str:
    return f"{format_bytes(nbytes)} of {format_bytes(device_bytes)}"


def device_shortfall(needs: Sequence[PhaseNeed], machine: Machine, limits: Limits, device_bytes: int) -> DoesNotFit:
    """The device budget is too small even with one slot in the phase that needs most."""
    worst = max(needs, key=lambda need: need.smallest_bytes)
    needed_bytes = worst.smallest_bytes
    help_ = _device_remedy(needed_bytes, machine)
    if worst.activation_bytes:
        help_ += ", or a smaller reserve" if limits.reserve_bytes is not None else ", or a smaller reserve or workload"
    return DoesNotFit(
        _shortfall_line(worst.name, needed_bytes, device_bytes, machine) + f"; {help_}", _device_misses(needs, machine, device_bytes)
    )


def only_disk_outside(phase: str, needs: Sequence[PhaseNeed], machine: Machine, device_bytes: int) -> DoesNotFit:
    """RAM is the compute tier, not everything fits in it, and the disk may not be used."""
    needed_bytes = together_bytes(needs)
    remedy = f"{_device_remedy(needed_bytes, machine)}, or allow_disk=True"
    line = _shortfall_line(phase, needed_bytes, device_bytes, machine, " without the disk")
    return DoesNotFit(f"{line}; {remedy}", (NearMiss("direct", needed_bytes, device_bytes, remedy),))


def host_shortfall(phase: str, needs: Sequence[PhaseNeed], machine: Machine, outside_bytes: int, host_bytes: int) -> DoesNotFit:
    """RAM does not hold what waits outside the device, and the disk may not be used."""
    size = ceil_size(outside_bytes)
    # Granting more RAM than is available would only be clipped.
    waiting = f"give host_memory='{size}' or more" if outside_bytes <= machine.host.available_bytes else f"make {size} of RAM available"
    together = together_bytes(needs)
    ways = [waiting, "allow_disk=True"]
    if together <= machine.compute.free_bytes:
        ways.append(f"overflow='{ceil_size(together)}' to keep everything on {machine.compute.torch_name}")
    line = f"{phase}: {size} must wait in RAM and its budget is {_floor_size(host_bytes)}: {ceil_size(outside_bytes - host_bytes)} short"
    remedy = ", ".join(ways[:-1]) + f", or {ways[-1]}"
    return DoesNotFit(f"{line}; {remedy}", (NearMiss("stream from RAM", outside_bytes, host_bytes, remedy),))


def _shortfall_line(phase: str, needed_bytes: int, device_bytes: int, machine: Machine, how: str = "") -> str:
    return (
        f"{phase}: needs at least {ceil_size(needed_bytes)} on {machine.compute.torch_name}{how} and the budget is "
        f"{_floor_size(device_bytes)}: {ceil_size(needed_bytes - device_bytes)} short"
    )


def _device_remedy(needed_bytes: int, machine: Machine) -> str:
    device = machine.compute
    if needed_bytes <= device.free_bytes:
        return f"give overflow='{ceil_size(needed_bytes)}' or more"
    # A larger budget would only be clipped to what is free.
    if needed_bytes <= device.total_bytes:
        return f"only {_floor_size(device.free_bytes)} of its {_floor_size(device.total_bytes)} are free: end what holds the rest"
    return f"it has {_floor_size(device.total_bytes)} in all: take a larger device"


def _device_misses(needs: Sequence[PhaseNeed], machine: Machine, device_bytes: int) -> tuple[NearMiss, ...]:
    worst = max(needs, key=lambda need: need.smallest_bytes)
    ways = {f"stream {worst.name} with one staging slot": worst.smallest_bytes}
    if len(needs) > 1:
        ways["phased"] = max(need.whole_bytes for need in needs)
    ways["direct"] = together_bytes(needs)
    misses = [NearMiss(way, nbytes, device_bytes, _device_remedy(nbytes, machine)) for way, nbytes in ways.items()]
    return tuple(sorted(misses, key=lambda miss: miss.needed_bytes))


def _floor_size(nbytes: int) -> str:
    # What is needed is rounded up and what there is rounded down, so that a message never says "812MB of 812MB".
    return ceil_size(-nbytes).lstrip("-")
