"""Brings the rooms together: describe, plan, attach, give back. The only file, beside the built-in plugin, that sees
planner, inspect and runtime."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from overflowml_core import builtin, environment
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.loading import Loading, loading
from overflowml_core.plan import Plan
from overflowml_core.plugins import Plugins

if TYPE_CHECKING:
    from torch import nn

    from overflowml_core.protocols import Attachment

_ATTACHMENT = "_overflowml_attachment"
"""Where a managed object carries its attachment. A registry on our side would keep the model alive for ever: the
attachment refers to it."""

_plugins: list[Plugins] = []
_plugins_lock = threading.Lock()


def plugins() -> Plugins:
    """The plugins of this process, loaded on first use."""
    with _plugins_lock:
        if not _plugins:
            _plugins.append(Plugins({"builtin": builtin}))
        return _plugins[0]


_installed: list[bool] = []


def install() -> None:
    """Put the requests into the hosts. A second call does nothing."""
    if not _installed:
        _installed.append(True)
        plugins().install_hosts()


def uninstall() -> None:
    """Leave the hosts as they were. A second call does nothing."""
    if _installed:
        _installed.clear()
        plugins().uninstall_hosts()


@contextlib.contextmanager
def hosts() -> Iterator[None]:
    """Have the hosts installed for a while, as they are anyway unless the user took them out: folders are described by the
    hosts' own loaders."""
    was_installed = bool(_installed)
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()


def detect() -> Machine:
    """This machine: accelerators, RAM as this process may use it, free disk in the cache folder."""
    from overflowml_core.inspect.machine import detect_machine

    return detect_machine(plugins().accelerators(), environment.cache_folder())


def describe(source: object, workload: Workload | None = None, options: dict[str, object] | None = None) -> Network:
    """What a model consists of; no weight is read.

    Args:
        source: a folder, a live module or a live pipeline.
        workload: for the estimate of activations.
        options: what the host's ``from_pretrained`` would be given besides the source.

    Raises:
        NotAModel: no plugin knows the source.
        BadCheckpoint: its files are broken.
    """
    if isinstance(source, (str, Path)):
        _check_path(Path(source))
    network = plugins().describe(source, workload or Workload(), dict(options or {}))
    if network is None:
        shown = source if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
        raise NotAModel(shown, "give a diffusers pipeline or transformers folder, or a live module or pipeline")
    return network


def _check_path(path: Path) -> None:
    if not path.exists():
        raise NotAModel(path, "the path does not exist; give a local folder (download a Hub repository first)")
    if path.is_file():
        raise NotAModel(path, "this is a file; give the folder that holds config.json or model_index.json")


def local_folder(source: object) -> Path | None:
    """The folder that a host is asked to load, None where it is to be found elsewhere (a Hub repository, ``owner/name``).

    Raises:
        NotAModel: it can only be a path, and leads to no folder.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(os.fspath(source))
    if path.is_dir():
        return path
    # A host would look for it on the Hub, and complain of the name that it is not.
    if not isinstance(source, str) or path.is_file() or path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2:
        _check_path(path)
    return None


def make_plan(network: Network, limits: Limits, workload: Workload | None = None, machine: Machine | None = None) -> Plan:
    """Decide where the weights of a network live.

    Args:
        network: from :func:`describe`.
        limits: what the user grants; what is open is filled from the environment, then from the machine.
        workload: what it will be asked to do.
        machine: detected if it is not given.

    Raises:
        DoesNotFit: no plan respects the limits.
    """
    plan = plugins().plan(network, machine or detect(), workload or Workload(), environment.with_environment(limits))
    if plan is None:  # the built-in plugin always answers, unless somebody took it out
        raise OverflowmlError("no plugin made a plan; restore the built-in one")
    plugins().planned(plan)
    return plan


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
    return cast("Attachment", made)


def _attach(plan: Plan, network: Network, machine: Machine, modules: dict[str, nn.Module], load: Loading | None) -> Any:
    from overflowml_core.runtime.device import open_device
    from overflowml_core.runtime.direct import Direct
    from overflowml_core.runtime.engine import Engine

    device = open_device(machine.compute)
    if not plan.managed:
        return Direct(plan, network, device).attach(modules, load)
    progress = _progress(load)
    return Engine(plan, network, device, environment.cache_folder() / "packed").attach(modules, load, progress)


def _progress(load: Loading | None) -> Callable[[int, int], None]:
    tell = plugins().progress
    return lambda done, total: tell(load, done, total)


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
