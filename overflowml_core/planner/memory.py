"""How many bytes there are to plan with, and how many a phase needs. Knows nothing of which block goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overflowml_core.facts import Block, Component, Limits, Machine, Network
from overflowml_core.plan import Budget
from overflowml_core.units import format_bytes, parse_bytes

_LEAST_DRIVER_BYTES = parse_bytes("256MiB")
_LEAST_SYSTEM_BYTES = parse_bytes("1GiB")
_LEAST_HOST_BYTES = parse_bytes("2GiB")


@dataclass(frozen=True, slots=True)
class PhaseNeed:
    """What one phase asks of the compute tier.

    Attributes:
        name: the phase.
        components: its components, in order.
        fixed_bytes: slabs of all weights outside blocks; they are resident while the phase runs.
        activation_bytes: kept free for activations and caches.
        blocks: (component, block) in order of execution.
        sizes_bytes: what each block takes of the device; 0 where it is tied to another.
        owners: index of the block whose tensors each one uses: its own, or that of the block it is tied to.
    """

    name: str
    components: tuple[Component, ...]
    fixed_bytes: int
    activation_bytes: int
    blocks: tuple[tuple[str, Block], ...]
    sizes_bytes: tuple[int, ...]
    owners: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Slabs of all its weights."""
        return self.fixed_bytes + sum(self.sizes_bytes)

    @property
    def whole_bytes(self) -> int:
        """Compute tier it takes with every weight resident."""
        return self.weight_bytes + self.activation_bytes

    @property
    def smallest_bytes(self) -> int:
        """Compute tier it takes at least: every block streamed through one slot."""
        return self.fixed_bytes + max(self.sizes_bytes, default=0) + self.activation_bytes

    @property
    def passes(self) -> int:
        """How often its most frequent component runs per unit of work."""
        return max((component.passes for component in self.components), default=1)


def phase_needs(network: Network, limits: Limits) -> tuple[PhaseNeed, ...]:
    """What each phase of a network needs, in the order in which they run."""
    return tuple(_phase_need(name, components, limits) for name, components in network.phases())


def _phase_need(name: str, components: tuple[Component, ...], limits: Limits) -> PhaseNeed:
    blocks: list[tuple[str, Block]] = []
    owners: list[int] = []
    for component in components:
        first = len(blocks)
        blocks += [(component.name, block) for block in component.blocks]
        owners += [first + index for index in _owners(component.blocks)]
    return PhaseNeed(
        name=name,
        components=components,
        fixed_bytes=sum(component.resident_bytes for component in components),
        activation_bytes=activation_bytes(components, limits),
        blocks=tuple(blocks),
        sizes_bytes=tuple(block.slab_bytes if owners[i] == i else 0 for i, (_, block) in enumerate(blocks)),
        owners=tuple(owners),
    )


def _owners(blocks: Sequence[Block]) -> list[int]:
    index_of = {block.name: index for index, block in enumerate(blocks)}
    owners = []
    for index in range(len(blocks)):
        seen, owner = {index}, index
        # Ties may be chained. One that leads nowhere or round in a circle is no tie: the block then counts with its own bytes.
        while (name := blocks[owner].tied_to) is not None:
            owner = index_of.get(name, index)
            if owner in seen:
                owner = index
                break
            seen.add(owner)
        owners.append(owner)
    return owners


def activation_bytes(components: Sequence[Component], limits: Limits) -> int:
    """Bytes that a phase keeps free for activations and caches: the reserve asked for, else the most that a component takes."""
    if limits.reserve_bytes is not None:
        return limits.reserve_bytes
    return max((component.activation_bytes for component in components), default=0)


def together_bytes(needs: Sequence[PhaseNeed]) -> int:
    """Compute tier that all phases take when no weight ever leaves it; activations take turns."""
    return sum(need.weight_bytes for need in needs) + max((need.activation_bytes for need in needs), default=0)


def resolve_budget(machine: Machine, limits: Limits) -> tuple[Budget, tuple[str, ...]]:
    """Turn what was asked for into what there is.

    Without ``device_memory`` an accelerator keeps 4 % of its memory, at least 256 MiB, out of the budget: the driver's context,
    the workspaces of cuBLAS and cuDNN and the allocator's fragments live there and belong to no plan. RAM as compute tier
    keeps 10 %, at least 1 GiB, for the rest of the system; RAM beside an accelerator 10 %, at least 2 GiB, because the
    page cache and the process itself need it too. What is asked for is never clipped by these margins, only by what is free.

    Args:
        machine: what there is.
        limits: what the user grants.

    Returns:
        The budget in bytes, and one sentence about its device part and one about its host part, if it has one.
    """
    device_bytes, device_reason = _device_budget(machine, limits)
    if machine.compute.unified:
        return Budget(device_bytes, 0, machine.disk_free_bytes), (device_reason,)
    host_bytes, host_reason = _host_budget(machine, limits)
    return Budget(device_bytes, host_bytes, machine.disk_free_bytes), (device_reason, host_reason)


def pinned_budget(machine: Machine, budget: Budget) -> int:
    """Bytes of the host budget that may be page-locked."""
    return min(machine.host.pinnable_bytes, budget.host_bytes)


def _device_budget(machine: Machine, limits: Limits) -> tuple[int, str]:
    device = machine.compute
    what = f"budget of {device.torch_name}"
    if limits.device_bytes is not None:
        return _granted(what, limits.device_bytes, device.free_bytes)
    if device.kind == "cpu":
        return _spared(what, device.free_bytes, max(_LEAST_SYSTEM_BYTES, machine.host.total_bytes // 10), "the system")
    return _spared(what, device.free_bytes, max(_LEAST_DRIVER_BYTES, device.total_bytes // 25), "the driver and libraries")


def _host_budget(machine: Machine, limits: Limits) -> tuple[int, str]:
    host = machine.host
    what = "RAM for weights outside the device"
    if limits.host_bytes is not None:
        return _granted(what, limits.host_bytes, host.available_bytes)
    return _spared(what, host.available_bytes, max(_LEAST_HOST_BYTES, host.total_bytes // 10), "the system")


def _granted(what: str, asked_bytes: int, free_bytes: int) -> tuple[int, str]:
    if asked_bytes <= free_bytes:
        return asked_bytes, f"{what}: {format_bytes(asked_bytes)}, as asked"
    return max(0, free_bytes), f"{what}: asked for {format_bytes(asked_bytes)}, but only {format_bytes(free_bytes)} is free"


def _spared(what: str, free_bytes: int, margin_bytes: int, keeper: str) -> tuple[int, str]:
    left_bytes = max(0, free_bytes - margin_bytes)
    return (
        left_bytes,
        f"{what}: {format_bytes(left_bytes)}, that is {format_bytes(free_bytes)} free less {format_bytes(margin_bytes)} for {keeper}",
    )
