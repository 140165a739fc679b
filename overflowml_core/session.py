"""Attaches plans to live models and gives them back. With the built-in plugin the only file that sees planner, inspect and runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from overflowml_core import environment
from overflowml_core.description import describe, describe_moe, local_folder
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.loading import Loading, loading
from overflowml_core.plan import Plan
from overflowml_core.planning import abilities_of, calibrate, codecs_of, detect, is_forecast, make_plan, timeline, with_outlook
from overflowml_core.progress import loading_bar
from overflowml_core.registry import hosts, install, plugins, uninstall
from overflowml_core.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

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

_ATTACHMENT = "_overflowml_attachment"
"""Where a managed object carries its attachment. A registry on our side would keep the model alive for ever: the
attachment refers to it."""


def attachment(target: object) -> Attachment | None:
    """The attachment of a managed model or pipeline, None where it is not managed."""
    found: Attachment | None = getattr(target, "__dict__", {}).get(_ATTACHMENT)
    return found


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
    # Whoever hands over a plan wants that one, unless it says otherwise.
    trial = (plan.limits.trial or False) if plan is not None else limits.trial
    plan = plan or make_plan(network, limits, workload, machine)
    made = _attach(plan, network, machine, modules, load)
    marked = [target, *(m for m in modules.values() if m is not target)]
    try:
        for part in marked:
            vars(part)[_ATTACHMENT] = made
        plugins().attached(target, made)
    except BaseException:
        _forget(marked)
        made.detach()
        raise
    made.on_detach(lambda: _forget(marked))
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


def _attach(plan: Plan, network: Network, machine: Machine, modules: dict[str, nn.Module], load: Loading | None) -> Any:
    from overflowml_core.runtime.device import open_device
    from overflowml_core.runtime.direct import Direct
    from overflowml_core.runtime.engine import Engine

    device = open_device(machine.compute)
    if not plan.managed:
        return Direct(plan, network, device).attach(modules, load)
    folder = environment.cache_folder() / "packed"
    with loading_bar(load is None or load.shows_progress) as shown:
        progress = _progress(load, shown)
        return Engine(plan, network, device, folder, codecs_of(plan, machine)).attach(modules, load, progress)


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
    """Give a managed model or pipeline back as it was; False where it was not managed."""
    found = attachment(target)
    if found is None:
        return False
    report = found.report()
    found.detach()
    vars(target).pop(_ATTACHMENT, None)
    plugins().ran(found.plan, report)
    return True
