"""Attaches plans to live models and gives them back. With the built-in plugin the only file that sees planner, inspect and runtime."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from overflowml_core import description, environment, planning
from overflowml_core.description import describe_moe, local_folder
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.heat_store import with_heat
from overflowml_core.loading import Loading, loading
from overflowml_core.plan import Plan
from overflowml_core.planning import abilities_of, calibrate, codecs_of, detect, is_forecast, timeline, with_outlook
from overflowml_core.progress import loading_bar
from overflowml_core.registry import hosts, install, plugins, uninstall
from overflowml_core.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from overflowml_core.expert_setting import ExpertSetting
    from overflowml_core.formats import Format
    from overflowml_core.measured import MeasuredPass
    from overflowml_core.protocols import Attachment
    from overflowml_core.runtime.engine import Engine

__all__ = [
    "abilities_of",
    "attachment",
    "calibrate",
    "codecs_of",
    "describe",
    "describe_moe",
    "detect",
    "hosts",
    "install",
    "is_forecast",
    "local_folder",
    "make_plan",
    "manage",
    "optimize",
    "plugins",
    "release",
    "timeline",
    "uninstall",
    "with_outlook",
]

_log = logging.getLogger("overflowml")

_one_at_a_time = threading.RLock()
"""Held while a plan is made and carried out: two at once would both count the memory that is free as theirs."""


def _forked() -> None:
    """In a forked process nobody else manages anything; who did so at the fork is not there."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

_ATTACHMENT = "_overflowml_attachment"
"""Where a managed object carries its attachment. A registry on our side would keep the model alive for ever: the
attachment refers to it."""


def attachment(target: object) -> Attachment | None:
    """The attachment of a managed model or pipeline, None where it is not managed."""
    found: Attachment | None = getattr(target, "__dict__", {}).get(_ATTACHMENT)
    return found


def describe(source: object, workload: Workload | None = None, options: dict[str, object] | None = None, fresh: bool = False) -> Network:
    """:func:`overflowml_core.description.describe`, with what earlier runs counted of its experts."""
    return with_heat(description.describe(source, workload, options, fresh))


def make_plan(
    network: Network,
    limits: Limits,
    workload: Workload | None = None,
    machine: Machine | None = None,
    forecast: bool = False,
    own_formats: tuple[Format, ...] | None = None,
) -> Plan:
    """:func:`overflowml_core.planning.make_plan`, or the plan that ``overflowml tune`` measured to be faster for the same request."""
    machine = machine or detect()
    plan = planning.make_plan(network, limits, workload, machine, forecast, own_formats)
    if forecast or own_formats is not None or not plan.managed or not environment.uses_tuned():
        return plan
    from overflowml_core.tuned import tuned_instead

    tuned = tuned_instead(plan, network, machine)
    if tuned is None:
        return plan
    objections = plugins().objections(tuned.plan, network, machine)
    if objections:
        _log.warning("the tuned plan %s is not used: %s objects to it now", tuned.plan.fingerprint, objections[0].trap)
        return plan
    _log.info("%s: %s", network.class_name, tuned.sentence)
    # Its neighbours were run already: no trial, unless somebody insists.
    return replace(tuned.plan, limits=replace(plan.limits, trial=plan.limits.trial or False))


def manage(
    target: object, limits: Limits, workload: Workload | None = None, load: Loading | None = None, plan: Plan | None = None
) -> Attachment:
    """Plan for a live model or pipeline and carry the plan out.

    Args:
        target: the model or pipeline, loaded or with weights that ``load`` knows the origins of.
        limits: what the user grants.
        workload: what it will be asked to do.
        load: the load that left weights unread.
        plan: carry out this one instead of making one.

    Raises:
        DoesNotFit: no plan respects the limits; the target is as it was.
        OverflowmlError: it is managed already, or something else went wrong; the target is as it was.
    """
    with _one_at_a_time:
        return _manage(target, limits, workload, load, plan)


def _manage(target: object, limits: Limits, workload: Workload | None, load: Loading | None, plan: Plan | None) -> Attachment:
    modules = _modules(target)
    # A part deep inside counts too: its weights change place while this plan would hold them.
    inner = [(f"{name}.{path}" if path else name, part) for name, module in modules.items() for path, part in module.named_modules()]
    for name, part in [("it", target), *inner]:
        if attachment(part) is not None:
            raise OverflowmlError(
                f"{type(target).__name__}: {name} is managed by overflowml already; call overflowml.release on its owner first"
            )
    # Describing must not be taken for a load of a component.
    with loading(None):
        network = describe(target, workload)
    machine = detect()
    is_given = plan is not None
    plan = plan or make_plan(network, limits, workload, machine)
    # Whoever hands over a plan wants that one, unless it says otherwise.
    trial = (plan.limits.trial or False) if is_given else plan.limits.trial
    made = _open(plan, network, machine)
    marked = [target, *(m for m in modules.values() if m is not target)]
    try:
        _attach(made, modules, load)
        for part in marked:
            vars(part)[_ATTACHMENT] = made
        plugins().attached(target, made)
    except BaseException:
        _forget(marked)
        made.detach()
        raise
    made.on_detach(lambda: _forget(marked))
    if any(place.experts_home is not None for place in plan.placements()):
        _record_heat(made, target, modules)
    if trial is not False and plan.managed:
        _begin_trial(made, machine, workload is not None)
    return cast("Attachment", made)


def optimize(target: object, model_size_gb: float | None, limits: Limits, workload: Workload | None) -> Attachment:
    """:func:`manage`, for a caller who says how large the weights are.

    Raises:
        BadSize: the size is none.
    """
    said_bytes = None
    if model_size_gb is not None:
        text = str(model_size_gb).strip()
        said_bytes = parse_bytes(text if text[-1:].isalpha() else f"{text}GB", "model_size_gb")
    made = manage(target, limits, workload)
    measured_bytes = made.network.weight_bytes
    if said_bytes is not None and abs(said_bytes - measured_bytes) * 10 > measured_bytes:
        _log.warning(
            "model_size_gb=%s: the weights of this %s take %s; planned with that",
            model_size_gb,
            type(target).__name__,
            format_bytes(measured_bytes),
        )
    return made


def _open(plan: Plan, network: Network, machine: Machine) -> Any:
    """What carries out the plan, attached to nothing yet: whoever is interrupted holds what there is to detach."""
    from overflowml_core.runtime.device import open_device
    from overflowml_core.runtime.direct import Direct
    from overflowml_core.runtime.engine import Engine

    device = open_device(machine.compute)
    if not plan.managed:
        return Direct(plan, network, device)
    folder = environment.cache_folder() / "packed"
    return Engine(plan, network, device, folder, codecs_of(plan, machine), _expert_setting(plan, network, machine))


def _attach(made: Any, modules: dict[str, nn.Module], load: Loading | None) -> None:
    if not made.plan.managed:
        made.attach(modules, load)
        return
    with loading_bar(load is None or load.shows_progress) as shown:
        made.attach(modules, load, _progress(load, shown))


def _expert_setting(plan: Plan, network: Network, machine: Machine) -> ExpertSetting | None:
    """How routed experts are run, from what earlier runs counted and what is measured; None where the plan has none apart."""
    tiers = {place.experts_home for place in plan.placements() if place.experts_home is not None}
    if not tiers:
        return None
    from overflowml_core.expert_setting import ExpertSetting
    from overflowml_core.planner.expert_pace import cpu_bytes_per_s, fetch_bytes_per_s

    heat = {
        (component.name, block.name): block.experts.heat
        for component in network.components
        for block in component.blocks
        if block.experts is not None and block.experts.heat
    }
    in_ram = machine.compute.unified
    return ExpertSetting(heat, min(fetch_bytes_per_s(tier, machine.rates, in_ram) for tier in tiers), cpu_bytes_per_s(machine))


def _record_heat(engine: Engine, target: object, modules: dict[str, nn.Module]) -> None:
    from overflowml_core.heat_recorder import HeatRecorder

    names = dict.fromkeys(place.component for place in engine.plan.placements() if place.experts_home is not None)
    loaded_from = getattr(getattr(target, "config", None), "_name_or_path", None)
    source = loaded_from if isinstance(loaded_from, str) and loaded_from else engine.network.source
    HeatRecorder(engine, source).begin(modules[name] for name in names)


def _begin_trial(engine: Engine, machine: Machine, knows_work: bool) -> None:
    """Run other plans in the first passes, always or where they are close, and keep what was learned.

    Args:
        engine: attached.
        machine: for which its plan was made.
        knows_work: the workload was told, so that profiled passes may be held against those that run.
    """
    from overflowml_core.inspect.calibration import correct_calibration
    from overflowml_core.planner.trial import Contest, corrected, is_close
    from overflowml_core.runtime.trial import Trial

    plan, network, formats = engine.plan, engine.network, plugins().formats(machine)
    if plan.limits.trial is None and not is_close(plan, network, machine, formats):
        return
    known = network if knows_work else replace(network, components=())

    def keep(lessons: Sequence[MeasuredPass]) -> None:
        try:
            correct_calibration(machine, lambda rates: corrected(rates, known, lessons), environment.cache_folder())
        except OverflowmlError as error:
            _log.warning("what a trial of plans taught is not kept: %s", error)

    Trial(engine, Contest(plan, network, machine, formats), keep).begin()


def _progress(load: Loading | None, shown: Callable[[int, int], None]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        shown(done, total)
        plugins().progress(load, done, total)

    return progress


def _modules(target: object) -> dict[str, nn.Module]:
    modules = plugins().components(target)
    if modules is None:
        raise NotAModel(f"a {type(target).__name__}", "give a torch module, a diffusers pipeline or a transformers model")
    return cast("dict[str, nn.Module]", modules)


def _forget(parts: list[object]) -> None:
    for part in parts:
        vars(part).pop(_ATTACHMENT, None)


def release(target: object) -> bool:
    """Give a managed model or pipeline back as it was; False where it was not managed, or another thread gave it back meanwhile.

    Waits for the calls of other threads.

    Routed experts that stayed on disk are read for it, as far as RAM has room for them; others stay without data, with a warning.
    """
    found = attachment(target)
    if found is None:
        return False
    report = found.report()
    experts = getattr(found, "experts", None)
    if experts is not None and experts.unread_bytes:
        experts.room_bytes = detect().host.available_bytes * 9 // 10  # something is left for who reads them
    try:
        is_first = found.detach()
    except BaseException:
        vars(target)[_ATTACHMENT] = found  # the next release goes on where this one was broken off
        raise
    if attachment(target) is found:  # it may be managed anew by now
        vars(target).pop(_ATTACHMENT, None)
    if not is_first:
        return False
    plugins().ran(found.plan, report)
    return True
