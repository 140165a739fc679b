"""What a known trap is: when it applies, what it does to people, what is done about it, and how it is recognized. Knows no trap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from overflowml_core.traps.objection import Objection

if TYPE_CHECKING:
    from overflowml_core.facts import Machine, Network
    from overflowml_core.plan import Plan

TrapKind = Literal["plan", "host", "environment"]
"""Who can step into it: a plan of ours; the user, with a call of a host's own; the machine, as it is set up."""


@dataclass(frozen=True, slots=True)
class Step:
    """How a plan steps into a trap.

    Attributes:
        exclude: what planning must leave out, as in ``Objection.exclude``.
        reason: what would happen, in one sentence.
    """

    exclude: tuple[tuple[str, str], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What traps of the environment ask for. Values only: whoever makes it has read the environment.

    Attributes:
        environment: as in ``Machine.environment``: "linux", "windows", "macos", "wsl2", "wddm", "container".
        kinds: torch's device types of the accelerators ("cuda", "mps"), and "nvidia" where there is a device of NVIDIA, usable or not.
        variables: environment variables by name.
        cache_folder: where packed weights are written, as an absolute POSIX path; empty where nobody said.
        cache_file_system: type of the file system that holds it ("ext4", "tmpfs"); empty where nobody said.
    """

    environment: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)
    cache_folder: str = ""
    cache_file_system: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A trap that the environment is in, and the command or action that leads out of it."""

    trap: str
    detail: str
    fix: str


@dataclass(frozen=True, slots=True)
class Trap:
    """A known trap, as data with the logic that recognizes it.

    Attributes:
        name: short, with dashes.
        kind: who can step into it.
        applies_when, symptom, what_we_do: in words, one sentence each; ``what_we_do`` says too where a trap is only the hosts' own and
            cannot be met with this engine.
        evidence: where it is known from: "diffusers #13281", or a package, its version and a source file.
        step: for plan traps: how this plan steps into it, None where it does not. Pure.
        relevance: why a plan had to steer around it, with numbers of this plan, network and machine; empty where it was never in the way.
            Called with plans that do not step into it. Pure.
        look: for environment traps: what was found, None where the surroundings are not in it. Pure.
        guard: for host traps: what holds, by its place in the code.
    """

    name: str
    kind: TrapKind
    applies_when: str
    symptom: str
    what_we_do: str
    evidence: tuple[str, ...]
    step: Callable[[Plan, Network, Machine], Step | None] | None = None
    relevance: Callable[[Plan, Network, Machine], str] | None = None
    look: Callable[[Surroundings], Finding | None] | None = None
    guard: str = ""

    def objection(self, plan: Plan, network: Network, machine: Machine) -> Objection | None:
        """What this trap has against a plan, None where the plan does not step into it."""
        step = None if self.step is None else self.step(plan, network, machine)
        if step is None:
            return None
        return Objection(self.name, step.exclude, step.reason, self.what_we_do, "; ".join(self.evidence))
