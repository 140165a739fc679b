"""What shall be: a plan, immutable, as versioned JSON, checked before anybody uses it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from overflowml_core.facts import Component, Limits, Tier, Workload
from overflowml_core.facts import digest as fingerprint_of
from overflowml_core.formats import AS_STORED
from overflowml_core.machine import Rates

PLAN_SCHEMA = 3
"""Version of the JSON form. It changes when a field changes its meaning; docs/plan-format.md lists the fields."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one block lives.

    Attributes:
        component: name of its component.
        block: name of the block inside it.
        tier: DEVICE where it is resident while its phase runs, else where it is streamed from.
        home: where its weights are when its phase does not run; DEVICE where they never leave.
        stored_bytes: bytes of its slab, in the format that it has on the device; without its routed experts where these are offloaded.
        format: name of the format into which its linear weights are converted; empty where they stay as stored.
        device: index of the accelerator that computes it, in ``Plan.devices``.
        experts_home: where its routed experts wait, one record each; None where it has none or they are part of its slab.
    """

    component: str
    block: str
    tier: Tier
    home: Tier
    stored_bytes: int
    format: str = AS_STORED
    device: int = 0
    experts_home: Tier | None = None


@dataclass(frozen=True, slots=True)
class PassEstimate:
    """One kind of pass over one component, predicted or measured.

    Attributes:
        component, name: whose pass, and which ("denoise", "token").
        count: how often it happens per unit of work.
        activation_bytes: of the device, caches included.
        pass_s: one pass in the rhythm of many; None where nobody knows, as all times.
        compute_s: of it, what computes.
        transfer_s: copies that it starts, one after the other; most of them run while something computes.
        stall_s: what computing waits: ``pass_s`` less ``compute_s``.
        bound_by: what works longest in a pass: "compute", "memory", "link", "disk", or None.
        expert_bytes: of the different routed experts that it asks for, where these are offloaded.
        missed_expert_bytes: of them, those that the cache does not hold.
        expert_hit_rate: share of them, by their number, that it does; None where none are offloaded.
    """

    component: str
    name: str
    count: int
    activation_bytes: int
    pass_s: float | None = None
    compute_s: float | None = None
    transfer_s: float | None = None
    stall_s: float | None = None
    bound_by: str | None = None
    expert_bytes: int = 0
    missed_expert_bytes: int = 0
    expert_hit_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prediction, or with the same fields what was measured. Bytes, seconds; None where nobody knows.

    Attributes:
        device_peak_bytes: most bytes taken of the compute tier.
        pinned_bytes: page-locked RAM.
        ram_bytes: pageable RAM that holds weights outside the compute tier.
        disk_bytes: weights that are read from disk when they are needed.
        streamed_bytes: weights that move to the device in one pass.
        pass_s, compute_s, transfer_s, stall_s: one pass, and what it consists of: of all passes the kind that takes most of the time.
        bound_by: "compute", "memory", "link", "disk" or None.
        total_s: a unit of work (an image, a clip, an answer): all passes, and what changing phases costs.
        first_token_s: until the first token of an answer; None where no language model answers.
        token_s: each token after it.
    """

    device_peak_bytes: int = 0
    pinned_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    streamed_bytes: int = 0
    pass_s: float | None = None
    compute_s: float | None = None
    transfer_s: float | None = None
    stall_s: float | None = None
    bound_by: str | None = None
    total_s: float | None = None
    first_token_s: float | None = None
    token_s: float | None = None


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What the compute tier holds while one phase runs.

    Attributes:
        name: the phase.
        components: its components, in order.
        fixed_bytes: slabs of all weights outside blocks.
        fixed_home: where these are when the phase does not run; DEVICE where they never leave.
        staging_bytes: the buffer on the device through which the streamed blocks pass, one behind the other, round and round.
        slot_bytes: the largest slot in it, that of the largest streamed slab.
        activation_bytes: kept free for activations and caches.
        placements: one per block, in order of execution.
        estimate: what this phase will take.
        variant: name of the variant of its component that is switched on ("slicing", "tiling"); empty where it runs as it is.
        expert_cache_bytes: device memory in which routed experts are cached; 0 where none are offloaded.
        passes: each kind of pass of its components.
    """

    name: str
    components: tuple[str, ...]
    fixed_bytes: int
    fixed_home: Tier
    staging_bytes: int
    slot_bytes: int
    activation_bytes: int
    placements: tuple[Placement, ...]
    estimate: Estimate
    variant: str = ""
    expert_cache_bytes: int = 0
    passes: tuple[PassEstimate, ...] = ()

    @property
    def resident_bytes(self) -> int:
        """Slabs of the blocks that stay on the device while the phase runs."""
        return sum(p.stored_bytes for p in self.placements if p.tier is Tier.DEVICE)

    @property
    def slot_count(self) -> int:
        """How many of the largest streamed block the staging buffer holds."""
        return self.staging_bytes // self.slot_bytes if self.slot_bytes else 0

    @property
    def streamed(self) -> tuple[Placement, ...]:
        """The blocks that pass through the staging slots, in order."""
        return tuple(p for p in self.placements if p.tier is not Tier.DEVICE)

    @property
    def devices(self) -> tuple[int, ...]:
        """The accelerators that compute in this phase, by their index; the first one always does."""
        return tuple(sorted({0, *(p.device for p in self.placements)}))

    def bytes_on(self, device: int) -> int:
        """Bytes of one accelerator in this phase: weights, staging, activations. Fixed weights and cached experts are on the first."""
        own = [p for p in self.placements if p.device == device]
        streams = any(p.tier is not Tier.DEVICE for p in own) or (device == 0 and self.staging_bytes and not self.streamed)
        resident = sum(p.stored_bytes for p in own if p.tier is Tier.DEVICE)
        staging = self.staging_bytes if streams else 0
        return (self.fixed_bytes + self.expert_cache_bytes if device == 0 else 0) + resident + staging + self.activation_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the compute tier in this phase, all of its accelerators together: weights, staging, activations."""
        return sum(self.bytes_on(device) for device in self.devices)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A strategy that was considered and not chosen, and why.

    Attributes:
        strategy: which one ("direct", "stream fp8").
        reason: why not, with numbers.
        estimate: what it would take, None where that was not worked out.
        viable: it would run within the limits, only not better.
        quality: what it would do to the result: "lossless", "minimal" or "any".
        carried_out: this version of the project can carry it out on this kind of source.
    """

    strategy: str
    reason: str
    estimate: Estimate | None = None
    viable: bool = False
    quality: str = "lossless"
    carried_out: bool = True


@dataclass(frozen=True, slots=True)
class Avoided:
    """A known trap that the plan steered around: its name, what it would have done, and what the plan does instead."""

    trap: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What another machine would buy.

    Attributes:
        change: what is different, in words ("a card with 48.00 GiB").
        strategy: what would be chosen there.
        total_s: a unit of work there; None where nobody knows.
        device_bytes: what it would take of the device.
    """

    change: str
    strategy: str
    total_s: float | None
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits as they were resolved against the machine, in bytes.

    ``device_bytes`` is for all accelerators together; ``each_bytes`` for each of ``Plan.devices`` where there are several.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    each_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Which weights are where, when. See docs/plan-format.md for each field.

    ``fingerprint`` names the decision: it is the same in every host, for the same model, device kind, workload and limits,
    and the same placements. ``quality`` is what the plan does to the result, ``devices`` all that it computes on (empty: ``device`` alone),
    ``rates`` what its times rest on (without operations that were measured one by one), ``traps`` what it steered around, ``outlook``
    what other machines would buy, where somebody asked.
    """

    strategy: str
    network: str
    network_fingerprint: str
    weight_bytes: int
    device: str
    device_name: str
    workload: Workload
    limits: Limits
    budget: Budget
    phases: tuple[PhasePlan, ...]
    estimate: Estimate
    rejected: tuple[Rejected, ...] = ()
    reasons: tuple[str, ...] = ()
    quality: str = "lossless"
    devices: tuple[str, ...] = ()
    rates: Rates | None = None
    traps: tuple[Avoided, ...] = ()
    outlook: tuple[WhatIf, ...] = ()
    schema: int = PLAN_SCHEMA
    fingerprint: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.digest())

    def digest(self) -> str:
        """The fingerprint that belongs to the contents."""
        document = self._document()
        # What varies from run to run without changing the decision stays out: free bytes, words, and predictions.
        for transient in _TRANSIENT:
            del document[transient]
        document["limits"].pop("trial")  # what is tried later is no part of the decision
        document["device"] = self.device.partition(":")[0]
        for phase in document["phases"]:
            del phase["estimate"]
            del phase["passes"]
        return fingerprint_of(document)

    @property
    def kind(self) -> str:
        """The strategy without its format: "direct", "phased", "stream", "sequential", "experts", "devices" or "cpu"."""
        return self.strategy.partition(" ")[0]

    @property
    def takes_turns(self) -> bool:
        """Whether the phases are on the device one after the other, not all of them all the time."""
        return self.kind not in ("direct", "cpu")

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats into which weights are converted, sorted; empty where all stay as stored."""
        return tuple(sorted({p.format for phase in self.phases for p in phase.placements} - {AS_STORED}))

    @property
    def managed(self) -> bool:
        """Whether anything is left for the runtime to do: False where all weights simply stay on the device as they are stored."""
        return self.kind != "direct" or bool(self.formats) or any(phase.variant for phase in self.phases)

    def placements(self) -> tuple[Placement, ...]:
        """All placements of all phases, in order."""
        return tuple(p for phase in self.phases for p in phase.placements)

    def phase_of(self, component: str) -> PhasePlan | None:
        """The phase in which a component runs, None where the plan does not know the component."""
        return next((phase for phase in self.phases if component in phase.components), None)

    def component_fingerprint(self, component: Component) -> str:
        """Fingerprint of what the plan decides for one component, without what a host calls anything: the same in every host that loads the
        same weights and comes to the same decision about them, on the same kind of device, for the same request.

        Args:
            component: of the network that was planned.
        """
        limits, workload = (_plain(one) for one in (self.limits, self.workload))
        del limits["trial"]
        places = [[p.tier.value, p.home.value, p.format] for p in self.placements() if p.component == component.name]
        return fingerprint_of([component.content, self.device.partition(":")[0], workload, limits, self.quality, places])

    def check(self) -> Plan:
        """Hold the plan against its own limits and return it.

        Raises:
            BadPlan: it is over its budget, a slot is too small, a block stands twice, or a number is negative.
        """
        from overflowml_core.plan_check import check_plan

        check_plan(self)
        return self

    def summary(self) -> str:
        """The plan in words, for a terminal."""
        from overflowml_core.planner.explain import summarize

        return summarize(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON, in the form of docs/plan-format.md."""
        return json.dumps(self._document(), indent=indent, sort_keys=False)

    def _document(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in _ORDER}

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan back.

        Raises:
            BadPlan: the text is no plan of this version, or the plan breaks its own limits.
        """
        from overflowml_core.plan_reader import read_plan

        return read_plan(text).check()


_ORDER = (
    "schema",
    "fingerprint",
    "strategy",
    "network",
    "network_fingerprint",
    "weight_bytes",
    "device",
    "device_name",
    "workload",
    "limits",
    "budget",
    "phases",
    "estimate",
    "rejected",
    "reasons",
    "quality",
    "devices",
    "rates",
    "traps",
    "outlook",
)

_TRANSIENT = ("budget", "estimate", "rejected", "reasons", "device_name", "fingerprint", "network", "rates", "traps", "outlook")


def _plain(value: object) -> Any:
    if isinstance(value, Tier):
        return value.value
    if isinstance(value, (frozenset, set)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    names = getattr(type(value), "__dataclass_fields__", None)
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    return value
