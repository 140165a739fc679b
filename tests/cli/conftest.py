"""A command line run in this process, and plans to print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from overflowml_core import session
from overflowml_core.bare import bare_network, moe_network
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.inspect.named import named_machine
from overflowml_core.plan import Plan
from overflowml_core.planner.timeline import Timeline


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command line and gives its exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from overflowml_core.cli import app

        monkeypatch.setattr(sys, "argv", ["overflowml", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from."""

    plan: Plan
    network: Network
    machine: Machine

    @property
    def timeline(self) -> Timeline:
        return session.timeline(self.plan, self.network, self.machine)


def planned_for(network: Network, gpu: str = "RTX 5090", ram_bytes: int = 194 * 10**9) -> Planned:
    """A plan as the command line makes it for a bare size."""
    machine = named_machine(gpu, ram_bytes=ram_bytes)
    return Planned(session.make_plan(network, Limits(), Workload(), machine, forecast=True), network, machine)


@pytest.fixture(scope="session")
def diffusion() -> Planned:
    """40 GB of a diffusion transformer on a card of 32 GB: blocks are streamed."""
    return planned_for(bare_network(40 * 10**9, Workload()))


@pytest.fixture(scope="session")
def experts() -> Planned:
    """120 GB of a mixture of experts on a card of 32 GB."""
    return planned_for(moe_network(120, 12, 128, 8, 120 * 10**9, Workload()))


@pytest.fixture(scope="session")
def several() -> Planned:
    """The same 40 GB on two cards of 12 GB and little RAM: both stream."""
    return planned_for(bare_network(40 * 10**9, Workload()), "2x RTX 3060", 24 * 10**9)
