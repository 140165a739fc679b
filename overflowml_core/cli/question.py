"""Finds what a request names: the machine, the model, the limits. Then has it planned. Prints nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overflowml_core.cli.options import Request
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Bytes, Limits, Machine, Network, Workload
from overflowml_core.units import parse_bytes

if TYPE_CHECKING:
    from overflowml_core.plan import Plan
    from overflowml_core.planner.timeline import Timeline

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ZERO = re.compile(r"\s*0+(\.0*)?\s*([KMGT]?i?B)?\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """A request with everything that it names found.

    Attributes:
        network: what shall run.
        machine: what it shall run on.
        limits: what the user grants.
        workload: what it will be asked to do.
        forecast: no host would load this source by our plan, so that it may use all that the planner knows.
        local: its weights are on a disk of this machine already.
    """

    network: Network
    machine: Machine
    limits: Limits
    workload: Workload
    forecast: bool
    local: bool = True

    def plan(self, outlook: bool = False) -> Plan:
        """The plan; with ``outlook`` also what other machines would buy, which takes about as long again for each of them.

        Raises:
            DoesNotFit: no plan respects the limits.
        """
        from overflowml_core import session

        made = session.make_plan(self.network, self.limits, self.workload, self.machine, forecast=self.forecast)
        if outlook:
            made = session.with_outlook(made, self.network, self.limits, self.workload, self.machine, forecast=self.forecast)
        return made

    def timeline(self, plan: Plan) -> Timeline:
        """What computes, copies and is held when, in this plan."""
        from overflowml_core import session

        return session.timeline(plan, self.network, self.machine)

    @property
    def unknown_activations(self) -> tuple[str, ...]:
        """Components that nobody can say the activations of, and that no reserve was given for."""
        if self.limits.reserve_bytes is not None:
            return ()
        return tuple(c.name for c in self.network.components if c.activation_source == "none" and not c.profiles)


def question_of(request: Request) -> Question:
    """Find what a request names. What is cheap to refuse is looked at first, the model last.

    Raises:
        OverflowmlError: something in it is wrong or cannot be found; one line says what.
    """
    from overflowml_core import session

    workload = workload_of(request)
    ram_bytes = _size(request.ram, "--ram")
    limits = Limits(
        device_memory=_size(request.vram, "--vram"),
        host_memory=ram_bytes if request.gpu is None else None,
        reserve=Bytes(0) if request.reserve is not None and _ZERO.fullmatch(request.reserve) else _size(request.reserve, "--reserve"),
        allow_disk=not request.no_disk,
        quality=request.quality,
    )
    machine = machine_of(request)
    if request.no_quantize:
        barred = frozenset((form.name, "*") for form in session.plugins().formats(machine))
        limits = Limits(limits.device_memory, limits.host_memory, limits.reserve, limits.allow_disk, limits.quality, barred)
    forecast = request.moe is not None or session.is_forecast(request.source)
    local = request.moe is None and Path(request.source).exists()
    return Question(_network(request, workload, forecast), machine, limits, workload, forecast, local)


def workload_of(request: Request) -> Workload:
    """What a request asks a model to do.

    Raises:
        BadLimits: a number in it counts nothing.
    """
    return Workload(
        height=request.height,
        width=request.width,
        frames=request.frames,
        batch=request.batch,
        steps=request.steps,
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
    )


def described(request: Request, workload: Workload) -> Network:
    """The model that a request names.

    Raises:
        OverflowmlError: it is wrong or cannot be found; one line says what.
    """
    from overflowml_core import session

    return _network(request, workload, request.moe is not None or session.is_forecast(request.source))


def machine_of(request: Request) -> Machine:
    """The machine that a request is about: named, read from a file, or this one.

    Raises:
        OverflowmlError: the file cannot be read, or nobody knows the name.
    """
    from overflowml_core import session

    base = None
    if request.machine is not None:
        from overflowml_core.inspect.machine_file import read_machine

        base = read_machine(request.machine)
    if request.gpu is None:
        return session.detect() if base is None else base
    from overflowml_core.inspect.named import named_machine

    return named_machine(request.gpu, ram_bytes=_size(request.ram, "--ram"), base=base)


def _network(request: Request, workload: Workload, forecast: bool) -> Network:
    from overflowml_core import session

    if request.moe is not None:
        from overflowml_core.bare import source_size

        total_b, active_b, experts, per_token = request.moe
        return session.describe_moe(total_b, active_b, experts, per_token, source_size(request.source, "SOURCE"), workload)
    if request.dtype is not None and forecast:
        raise OverflowmlError(f"--dtype={request.dtype!r}: {request.source} has no weights that could be cast; leave it out")
    options = {} if request.dtype is None else {"torch_dtype": torch_dtype(request.dtype)}
    return session.describe(request.source, workload, options)


def _size(text: str | None, option: str) -> Bytes | None:
    return None if text is None else Bytes(parse_bytes(text, option))


def torch_dtype(name: str) -> object:
    """A dtype by its name, as users write it.

    Raises:
        OverflowmlError: torch has none of this name, or is not there.
    """
    try:
        import torch
    except ImportError:
        raise OverflowmlError(f"--dtype={name!r}: torch is not installed; pip install 'overflowml[transformers]'") from None
    found = getattr(torch, _DTYPES.get(name.lower(), name), None)
    if not isinstance(found, torch.dtype):
        raise OverflowmlError(f"--dtype={name!r}: no dtype of torch; bfloat16, float16 and float32 are")
    return found
