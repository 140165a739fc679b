"""Plans for parts of a graph, each as the core makes them, and what they mean together. Holds no module and no file open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from overflowml_comfyui.learning import with_measured_peak
from overflowml_comfyui.measurement import Measurement
from overflowml_comfyui.request import Request
from overflowml_core import session
from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Component, Machine, Network, Workload
from overflowml_core.plan import PassEstimate, Plan
from overflowml_core.units import ceil_size, format_bytes

FITS, SLOWER, REFUSED = "fits", "fits slower", "will not fit"


@dataclass(frozen=True, slots=True)
class Part:
    """One model of a graph: its name for people, its plan, or why there is none.

    Attributes:
        name: "model", "text encoder", "vae", or the file's name.
        plan: None where no plan respects the limits.
        refusal: why, and what would help; empty where there is a plan.
        network: as it was planned.
        workload: what was asked.
        measured: an earlier run of the same weights at the same sizes; None where there was none.
    """

    name: str
    plan: Plan | None
    refusal: str
    network: Network
    workload: Workload
    measured: Measurement | None = None

    @property
    def verdict(self) -> str:
        """One of ``FITS``, ``SLOWER``, ``REFUSED``."""
        if self.plan is None:
            return REFUSED
        return SLOWER if any(phase.streamed for phase in self.plan.phases) else FITS

    @property
    def slowest(self) -> PassEstimate | None:
        """The kind of pass that takes most of the time; None where nothing is known of any."""
        passes = [one for phase in self.plan.phases for one in phase.passes] if self.plan is not None else []
        return max(passes, key=lambda one: (one.pass_s or 0.0) * one.count, default=None)

    @property
    def component(self) -> Component:
        """What a sampler calls: of a checkpoint's components the one that runs most often."""
        return max(self.network.components, key=lambda one: (one.passes, one.weight_bytes))

    @property
    def fingerprint(self) -> str:
        """Of the decision, the same as a script's and another host's for these weights; empty where there is none."""
        return "" if self.plan is None else self.plan.component_fingerprint(self.component)

    @property
    def key(self) -> str:
        """Names what is run and how large it is: measurements of one are measurements of the other."""
        sizes = self.workload
        return key_of(self.component, {name: getattr(sizes, name) for name in _SIZES})

    def at(self, sizes: Mapping[str, int]) -> str:
        """The key of the same weights at the sizes at which they ran; what these leave open is as it was asked."""
        return key_of(self.component, {name: sizes.get(name, getattr(self.workload, name)) for name in _SIZES})


_SIZES = ("width", "height", "frames", "batch")


def key_of(component: Component, sizes: Mapping[str, int | None]) -> str:
    """The key under which runs of a component are kept.

    Args:
        component: whatever its host calls it.
        sizes: width, height, frames and batch; None and 0 are open. A video of one frame is an image.
    """
    frames = sizes.get("frames") or 0
    told = [sizes.get(name) or 0 for name in ("width", "height")] + [0 if frames == 1 else frames, sizes.get("batch") or 1]
    return "-".join([component.content, *map(str, told)])


@dataclass(frozen=True, slots=True)
class Decision:
    """The plans of the parts that share a device one after the other, as the host runs them."""

    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        """That of the part that fares worst."""
        verdicts = {part.verdict for part in self.parts}
        return next((worst for worst in (REFUSED, SLOWER) if worst in verdicts), FITS)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of the device that a part takes."""
        return max((part.plan.estimate.device_peak_bytes for part in self.parts if part.plan is not None), default=0)

    @property
    def refusal(self) -> str:
        """Why a part has no plan, in the planner's own words; empty where all have one."""
        return next((part.refusal for part in self.parts if part.refusal), "")


Recall = Callable[[str], Measurement | None]
"""What an earlier run took, by its key."""


def _nothing(_: str) -> Measurement | None:
    return None


def decide_module(name: str, module: object, request: Request, machine: Machine, recall: Recall = _nothing) -> Part:
    """Plan for a live module, as ``overflowml.plan(module)`` does.

    Args:
        name: what people call it.
        module: a torch module, loaded or not.
        request: what is asked.
        machine: where it runs.
        recall: earlier runs; what one was measured to hold beside weights is planned with.

    Raises:
        OverflowmlError: the module cannot be described.
    """
    return _decide(name, session.describe(module, request.workload), request, machine, recall)


def decide_file(path: Path, request: Request, machine: Machine, recall: Recall = _nothing) -> Part:
    """Plan for a file by its header alone.

    Args:
        path: a .safetensors or .gguf file.
        request: what is asked.
        machine: where it would run.
        recall: earlier runs, as for :func:`decide_module`.

    Raises:
        OverflowmlError: it is no model, or damaged.
    """
    state = path.stat()
    return _decide(path.name, _described(path, state.st_size, state.st_mtime_ns, request.workload), request, machine, recall)


@lru_cache(maxsize=32)
def _described(path: Path, nbytes: int, changed_ns: int, workload: Workload) -> Network:
    """A file's network, kept while the file does not change: a graph is queued again and again."""
    return session.describe(path, workload)


def _decide(name: str, network: Network, request: Request, machine: Machine, recall: Recall) -> Part:
    part = Part(name, None, "", network, request.workload)
    measured = recall(part.key)
    known = replace(part, network=with_measured_peak(network, part.component, measured), measured=measured)
    try:
        return replace(known, plan=session.make_plan(known.network, request.limits, request.workload, machine))
    except DoesNotFit as refusal:
        return replace(known, refusal=_in_fields(name, network, str(refusal)))


def _in_fields(name: str, network: Network, refusal: str) -> str:
    """The planner's refusal with what users see: the part's name for the component's, the node's field for Python's argument."""
    component = network.components[0].name
    shown = refusal.removeprefix(f"{component}: ") if len(network.components) == 1 else refusal
    lossless = shown.partition(", or permit ")[0]  # formats are not among what these nodes have carried out
    return f"{name}: {lossless}".replace("overflow='", "budget='")


def over_budget(decision: Decision, budget_bytes: int) -> str:
    """Why a decision breaks a budget, in one sentence; empty where it keeps it.

    Args:
        decision: what was planned.
        budget_bytes: most bytes of the device that a part may take.
    """
    if decision.refusal:
        return decision.refusal
    over = [part for part in decision.parts if part.plan is not None and part.plan.estimate.device_peak_bytes > budget_bytes]
    if not over:
        return ""
    worst = max(over, key=lambda part: part.plan.estimate.device_peak_bytes if part.plan is not None else 0)
    return (
        f"{worst.name}: its plan takes {format_bytes(decision.peak_bytes)} of the device, more than the budget of "
        f"{format_bytes(budget_bytes)}; give the node that plans it this budget, or raise it to {ceil_size(decision.peak_bytes)}"
    )
