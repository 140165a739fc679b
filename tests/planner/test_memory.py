"""Budgets as they are resolved against a machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from overflowml_core.facts import Limits
from overflowml_core.plan import Budget
from overflowml_core.planner.memory import pinned_budget, resolve_budget
from overflowml_core.planner.needs import phase_needs
from tests.planner.build import GIB, MIB, block, component, flux, machine, network


@pytest.mark.parametrize(
    ("mach", "limits", "device", "host"),
    [
        (machine(16 * GIB, 64 * GIB), Limits(), 16 * GIB - 16 * GIB // 25, 64 * GIB - 64 * GIB // 10),
        (machine(4 * GIB, 8 * GIB), Limits(), 4 * GIB - 256 * MIB, 6 * GIB),
        (machine(4 * GIB, GIB), Limits(device_memory="1GiB", host_memory="512MiB"), GIB, GIB // 2),
        (machine(4 * GIB, GIB), Limits(device_memory="8GiB", host_memory="8GiB"), 4 * GIB, GIB),
        (machine(100 * MIB, GIB), Limits(), 0, 0),
        (machine(None, 64 * GIB), Limits(), 64 * GIB - 64 * GIB // 10, 0),
        (machine(None, 4 * GIB), Limits(host_memory="2GiB"), 3 * GIB, 0),
        (machine(32 * GIB, 32 * GIB, unified=True), Limits(), 32 * GIB - 32 * GIB // 25, 0),
    ],
)
def test_budget(mach, limits, device, host):
    budget, reasons = resolve_budget(mach, limits)
    assert budget == Budget(device, host, mach.disk_free_bytes)
    assert len(reasons) == (1 if mach.compute.unified else 2)


def test_a_clipped_budget_says_so():
    _, reasons = resolve_budget(machine(4 * GIB, GIB), Limits(device_memory="8GiB"))
    assert reasons[0] == "budget of cuda:0: asked for 8.00 GiB, but only 4.00 GiB is free"


def test_pinned_memory_is_bounded_by_both():
    assert pinned_budget(machine(pinnable=GIB), Budget(0, 2 * GIB, 0)) == GIB
    assert pinned_budget(machine(pinnable=3 * GIB), Budget(0, 2 * GIB, 0)) == 2 * GIB


def test_reserve_replaces_every_estimate():
    assert [need.activation_bytes // MIB for need in phase_needs(flux(), Limits())] == [8, 92, 468, 1537]
    assert {need.activation_bytes for need in phase_needs(flux(), Limits(reserve="1GiB"))} == {GIB}
    assert {need.activation_bytes for need in phase_needs(flux(), Limits(reserve=0))} == {0}


def test_components_of_a_phase_share_the_budget():
    (need,) = phase_needs(network(component("a", [1, 2], 3, 40, phase="p"), component("b", [5], 7, 50, phase="p")), Limits())
    assert (need.fixed_bytes, need.activation_bytes, need.sizes_bytes, need.smallest_bytes) == (10, 50, (1, 2, 5), 65)


def test_ties_are_followed_and_broken_ones_ignored():
    ties = {1: "layers.0", 2: "layers.1", 4: "nowhere", 5: "layers.5"}
    blocks = tuple(replace(block(f"layers.{i}", 10), tied_to=ties.get(i)) for i in range(6))
    (need,) = phase_needs(network(replace(component("m", []), blocks=blocks)), Limits())
    assert need.owners == (0, 0, 0, 3, 4, 5)
    assert need.sizes_bytes == (10, 0, 0, 10, 10, 10)
