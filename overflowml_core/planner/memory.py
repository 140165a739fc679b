"""How many bytes there are to plan with. Knows nothing of what needs them."""

from __future__ import annotations

from overflowml_core.facts import Limits, Machine
from overflowml_core.plan import Budget
from overflowml_core.units import format_bytes, parse_bytes

_LEAST_DRIVER_BYTES = parse_bytes("256MiB")
_LEAST_SYSTEM_BYTES = parse_bytes("1GiB")
_LEAST_HOST_BYTES = parse_bytes("2GiB")


def resolve_budget(machine: Machine, limits: Limits) -> tuple[Budget, tuple[str, ...]]:
    """Turn what was asked for into what there is.

    Without ``device_memory`` an accelerator keeps 4 % of its memory, at least 256 MiB, out of the budget: the driver's context,
    the workspaces of cuBLAS and cuDNN and the allocator's fragments live there and belong to no plan. RAM as compute tier
    keeps 10 %, at least 1 GiB, for the rest of the system; RAM beside an accelerator 10 %, at least 2 GiB, because the
    page cache and the process itself need it too. What is asked for is never clipped by these margins, only by what is free.

    A device in unified memory that was detected grants what its system told (Metal's recommended working set). One that was only
    named is held to three quarters of its memory, which is what that working set comes to on large machines.

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
    if device.unified and device.kind != "cpu" and machine.named:
        granted_bytes = min(device.free_bytes, device.total_bytes * 3 // 4)
        return granted_bytes, f"{what}: {format_bytes(granted_bytes)}, three quarters of unified memory"
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
