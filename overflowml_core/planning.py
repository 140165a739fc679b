"""Makes plans: brings networks, machines, formats and objections together until nobody objects. Carries nothing out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from overflowml_core import environment, sources
from overflowml_core.description import describe
from overflowml_core.errors import OverflowmlError, Unsupported
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.formats import Format
from overflowml_core.plan import Plan
from overflowml_core.registry import plugins
from overflowml_core.traps import Objection, avoided
from overflowml_core.traps.objection import ANYWHERE

if TYPE_CHECKING:
    from overflowml_core.codec import Codec
    from overflowml_core.planner.timeline import Timeline


def detect() -> Machine:
    """This machine: accelerators, RAM as this process may use it, free disk in the cache folder."""
    from overflowml_core.inspect.machine import detect_machine

    return detect_machine(plugins().accelerators(), environment.cache_folder())


CARRIED_OUT = frozenset({"variants", "formats", "experts"})
"""What this version carries out beyond residency and streaming. A plan for a model that can be loaded keeps to it, so that what is read
before is what happens afterwards."""

FORECAST = CARRIED_OUT | {"formats of experts", "devices", "missing formats"}
"""What the planner knows. A size without a model behind it is planned with all of it."""

_QUALITY_LOADED, _QUALITY_FORECAST = "lossless", "minimal"
"""Where nobody said: the result of a model that is loaded is not changed unasked; a forecast changes nothing, and says what there is."""

_MOST_ROUNDS = 16
"""Each round excludes at least one more pair of format and tier; there are fewer kinds of them than this."""


def make_plan(
    network: Network,
    limits: Limits,
    workload: Workload | None = None,
    machine: Machine | None = None,
    forecast: bool = False,
    own_formats: tuple[Format, ...] | None = None,
) -> Plan:
    """Decide where the weights of a network live.

    Args:
        network: from :func:`describe`.
        limits: what the user grants; what is open is filled from the environment, then from the machine.
        workload: what it will be asked to do.
        machine: detected if it is not given.
        forecast: plan with everything that the planner knows, not only with what this version carries out.
        own_formats: into which the caller converts weights by itself; None for those that plugins convert into.

    Raises:
        DoesNotFit: no plan respects the limits.
        OverflowmlError: a plugin goes on objecting to every plan.
    """
    machine = machine or detect()
    asked = _settled(limits, forecast)
    formats = plugins().formats(machine) if own_formats is None else own_formats
    abilities = abilities_of(forecast)
    steered: list[Objection] = []
    excluded = asked.excluded
    for _ in range(_MOST_ROUNDS):
        plan = plugins().plan(network, machine, workload or Workload(), replace(asked, excluded=excluded), formats, abilities)
        if plan is None:  # the built-in plugin always answers, unless somebody took it out
            raise OverflowmlError("no plugin made a plan; restore the built-in one")
        raised = plugins().objections(plan, network, machine)
        unmade = frozenset() if forecast or own_formats is not None else _without_codec(plan, formats, machine)
        if not raised and not unmade:
            break
        steered += raised
        more = excluded.union(unmade, *(objection.exclude for objection in raised))
        if more == excluded:
            raise _persistent(raised, "the plan uses what was excluded")
        excluded = more
    else:
        raise _persistent(steered, f"after {_MOST_ROUNDS} plans")
    plan = replace(plan, traps=avoided(plan, network, machine, steered))
    plugins().planned(plan)
    return plan


def _without_codec(plan: Plan, formats: tuple[Format, ...], machine: Machine) -> frozenset[tuple[str, str]]:
    """Formats of a plan into which no plugin converts weights after all, as pairs to exclude."""
    named = {form.name: form for form in formats}
    return frozenset((name, ANYWHERE) for name in plan.formats if not named[name].parts or plugins().codec(named[name], machine) is None)


def codecs_of(plan: Plan, machine: Machine) -> dict[str, Codec]:
    """What converts weights into the formats of a plan, by their names.

    Raises:
        Unsupported: nobody converts weights into one of them on this machine.
    """
    named = {form.name: form for form in plugins().formats(machine)} if plan.formats else {}
    found = {name: plugins().codec(named[name], machine) if name in named else None for name in plan.formats}
    for name, codec in found.items():
        if codec is None:
            raise Unsupported(
                f"{name}: the plan converts weights into it, and no plugin does so on this machine; install torchao "
                f"(pip install 'overflowml[quantize]'), or exclude it with Limits(excluded={{('{name}', '*')}})"
            )
    return {name: codec for name, codec in found.items() if codec is not None}


def _settled(limits: Limits, forecast: bool) -> Limits:
    """The limits with what is open filled in: from the environment, and the quality by what they are for."""
    asked = environment.with_environment(limits)
    return replace(asked, quality=asked.quality or (_QUALITY_FORECAST if forecast else _QUALITY_LOADED))


def _persistent(objections: list[Objection], when: str) -> OverflowmlError:
    named = ", ".join(sorted({objection.trap for objection in objections}))
    return OverflowmlError(f"{when}, and a plugin still objects ({named}); leave that plugin out with OVERFLOWML_DISABLE_PLUGINS")


def abilities_of(forecast: bool) -> frozenset[str]:
    """What a plan may use: what this version carries out, or all that the planner knows."""
    return FORECAST if forecast else CARRIED_OUT


def is_forecast(source: object) -> bool:
    """Whether no host would load this source by a plan of ours (a size, a GGUF or single safetensors file): its plan may use all that the
    planner knows."""
    return isinstance(source, (str, os.PathLike, int, float)) and not sources.is_loadable(source)


def with_outlook(
    plan: Plan, network: Network, limits: Limits, workload: Workload | None = None, machine: Machine | None = None, forecast: bool = False
) -> Plan:
    """The plan with what a larger card, more RAM or a faster link would buy. Arguments as for :func:`make_plan`."""
    from overflowml_core.planner import with_outlook as add

    machine = machine or detect()
    # What was objected to stays left out on a larger machine, too.
    asked = replace(_settled(limits, forecast), excluded=plan.limits.excluded)
    return add(plan, network, machine, workload or Workload(), asked, plugins().formats(machine), abilities_of(forecast))


def timeline(plan: Plan, network: Network, machine: Machine) -> Timeline:
    """What computes, copies and is held when, by the cost model."""
    from overflowml_core.planner import timeline_of

    return timeline_of(plan, network, machine, plugins().formats(machine))


_OPERATIONS_S = 60.0
"""Seconds that measuring a model's own operations may take at most; there are 20 to 200 different ones in a model."""


def calibrate(
    progress: Callable[[str], None] | None = None,
    quick: bool = False,
    source: object | None = None,
    workload: Workload | None = None,
    options: dict[str, object] | None = None,
) -> Machine:
    """Measure this machine's rates and keep them: from then on its plans rest on them.

    Args:
        progress: told in words what is being measured.
        quick: fewer and smaller measurements.
        source: a model whose own operations are measured on random data, so that its times are predicted closely, and whose files show how
            fast the disk is that it lies on; as for :func:`describe`, but one that is run by its host's code. The machine's own rates are
            then measured only where none are kept.
        workload: what the model will be asked to do.
        options: as for :func:`describe`.

    Raises:
        NotAModel, BadCheckpoint: the source is none.
    """
    from overflowml_core.inspect.calibration import save_calibration, with_op_seconds
    from overflowml_core.runtime.calibrate import calibrate as measure_machine
    from overflowml_core.runtime.calibrate import measure_ops, with_disk_of
    from overflowml_core.runtime.fake import collecting

    folder = environment.cache_folder()
    machine = detect()
    if source is None or not machine.rates.measured:
        machine = measure_machine(machine, folder, progress, quick)
    if source is not None:
        with collecting() as recipes:
            describe(source, workload, options, fresh=True)
        if progress is not None:
            progress(f"{len(recipes)} operations of {source if isinstance(source, (str, os.PathLike)) else type(source).__name__}")
        machine = with_op_seconds(machine, measure_ops(recipes, machine.compute.torch_name, _OPERATIONS_S, machine.rates.launch_s))
        machine = with_disk_of(machine, sources.weight_files(source))
    save_calibration(machine, folder)
    return machine
