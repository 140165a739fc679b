"""Why a simple strategy was not taken, and why there is no plan, in sentences with numbers. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from overflowml_core.errors import DoesNotFit, NearMiss
from overflowml_core.facts import Limits, Machine, Tier
from overflowml_core.plan import Budget, Estimate, Rejected
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.needs import PhaseNeed, together_bytes
from overflowml_core.units import ceil_size, format_bytes

STRATEGIES = ("direct", "phased", "stream")
"""The simple ones, with weights as they are stored on one device; every plan names them."""


def rejected(strategy: str, needs: Sequence[PhaseNeed], device_bytes: int) -> tuple[Rejected, ...]:
    """Every strategy that was not chosen, and why."""
    return tuple(_rejected(other, strategy, needs, device_bytes) for other in STRATEGIES if other != strategy)


def _rejected(other: str, strategy: str, needs: Sequence[PhaseNeed], device_bytes: int) -> Rejected:
    if other == "direct":
        together = together_bytes(needs)
        return Rejected(other, f"needs {of(together, device_bytes)}", Estimate(device_peak_bytes=together))
    if other == "stream":
        largest_bytes = max((need.whole_bytes for need in needs), default=0)
        why = (
            _not_needed(needs, device_bytes)
            if strategy == "direct"
            else f"not needed: each phase takes at most {of(largest_bytes, device_bytes)}"
        )
        return Rejected(other, why)
    if strategy == "direct":
        return Rejected(other, _not_needed(needs, device_bytes))
    if len(needs) == 1:
        return Rejected(other, f"there is one phase, {needs[0].name}, and it needs {of(needs[0].whole_bytes, device_bytes)}")
    largest = max(needs, key=lambda need: need.whole_bytes)
    return Rejected(
        other, f"{largest.name} alone needs {of(largest.whole_bytes, device_bytes)}", Estimate(device_peak_bytes=largest.whole_bytes)
    )


def _not_needed(needs: Sequence[PhaseNeed], device_bytes: int) -> str:
    return f"not needed: everything together takes {of(together_bytes(needs), device_bytes)}"


def of(nbytes: int, device_bytes: int) -> str:
    """What is needed of what there is."""
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


def disk_refusal(drafts: Sequence[Draft], phase_homes: Sequence[PhaseHomes], machine: Machine, budget: Budget) -> DoesNotFit | None:
    """The error of a plan that needs the disk where it may not be used; None where it does not need it."""
    needs = [draft.need for draft in drafts]
    for need, phase in zip(needs, phase_homes, strict=True):
        if Tier.DISK not in (phase.fixed, *phase.blocks, *phase.experts):
            continue
        if machine.compute.unified:
            return only_disk_outside(need.name, needs, machine, budget.device_bytes)
        outside_bytes = sum(_outside_bytes(d, h) for d, h in zip(drafts, phase_homes, strict=True))
        return host_shortfall(need.name, needs, machine, outside_bytes, budget.host_bytes)
    return None


def _outside_bytes(draft: Draft, phase: PhaseHomes) -> int:
    total = draft.need.fixed_bytes if phase.fixed is not Tier.DEVICE else 0
    total += sum(size for size, home in zip(draft.need.sizes_bytes, phase.blocks, strict=True) if home is not Tier.DEVICE)
    for (_, block), weight, tier in zip(draft.need.blocks, draft.need.weights, phase.experts, strict=False):
        if tier is not None and block.experts is not None:
            total += block.experts.count * weight.expert_bytes
    return total


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
