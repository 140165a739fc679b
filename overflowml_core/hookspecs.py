"""The contract between the core and its plugins, one function per hook. Every hook has its page in docs/hooks.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from overflowml_core.codec import Codec
    from overflowml_core.facts import Accelerator, Limits, Machine, Network, Workload
    from overflowml_core.formats import Format
    from overflowml_core.loading import Loading
    from overflowml_core.plan import Estimate, Plan
    from overflowml_core.protocols import Attachment
    from overflowml_core.traps import Objection

PROJECT = "overflowml"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# ---- facts


@hookspec
def overflowml_accelerators() -> Iterable[Accelerator] | None:  # type: ignore[empty-body]
    """Name accelerators of this machine.

    Called by the session once for every plan. All answers are joined in the order in which plugins are asked, the built-in
    one last; the first accelerator of the list is the one that runs the model. None and an empty list both mean: none
    known here. Must not allocate on a device.

    Default: the built-in plugin names CUDA, ROCm, XPU and MPS devices, and whatever else ``torch.accelerator`` knows.
    """


@hookspec(firstresult=True)
def overflowml_describe(source: object, workload: Workload, options: dict[str, object]) -> Network | None:
    """Say what a model consists of.

    Called by the session for every plan, at least once. Stops at the first answer that is not None; None means: not my kind of source.
    Read only: must not move, cast or load a weight.

    Args:
        source: a path, a live module or a live pipeline.
        workload: what it will be asked to do; activations are estimated for it.
        options: what the host's ``from_pretrained`` would be given besides the source ("dtype", "variant", "subfolder"), if anything.

    Default: the built-in plugin describes any ``torch.nn.Module``. Implemented for real in ``overflowml_transformers``.
    """


@hookspec(firstresult=True)
def overflowml_measure(source: object, network: Network, workload: Workload, options: dict[str, object]) -> Network | None:  # type: ignore[empty-body]
    """Say what the passes of a network compute and hold, at a workload: fill in the profiles and variants of its components.

    Called by the session right after a description, once for every plan whose profile is not in the cache. Stops at the first answer that
    is not None; None means: not my kind of source, and the network keeps what its description says. Must not load, move or cast a weight,
    must not need an accelerator, and must leave the source as it was. Names, blocks, bytes and fingerprints of the network must come back
    unchanged.

    Args:
        source: what was described: a path, a live module or a live pipeline.
        network: its description.
        workload: sizes, batch, steps, tokens.
        options: as for ``overflowml_describe``.

    Default: none; implemented for real in ``overflowml_diffusers`` and ``overflowml_transformers``, which run the real code on fake
    tensors.
    """


@hookspec
def overflowml_formats(machine: Machine) -> Iterable[Format] | None:  # type: ignore[empty-body]
    """Name formats into which weights may be converted on this machine.

    Called by the session once for every plan. All answers are joined; a name that comes twice is an error that names both plugins. None and
    an empty list both mean: none here. Must not import torch.

    Args:
        machine: which devices there are; a format that none of them computes with is left out.

    Default: none; implemented for real in ``overflowml_torchao``.
    """


# ---- decisions


@hookspec(firstresult=True)
def overflowml_plan(
    network: Network, machine: Machine, workload: Workload, limits: Limits, formats: tuple[Format, ...], abilities: frozenset[str]
) -> Plan | None:
    """Decide where weights live.

    Called by the session for every plan, again with more ``limits.excluded`` while a plugin objects. Stops at the first answer that is not
    None; None means: no opinion. Pure: the same arguments give the same plan. Whatever is returned passes ``Plan.check`` before it is used.
    To refuse, raise DoesNotFit.

    Args:
        network: what is to run.
        machine: what there is to run it.
        workload: what it will be asked to do.
        limits: what the user grants, as asked; unresolved against the machine.
        formats: what weights may be converted into.
        abilities: what can be carried out beyond plain residency and streaming: "formats", "experts", "devices", "variants". A plan that
            needs more may be named among the rejected, and must not be chosen.

    Default: ``overflowml_core.planner``.
    """


@hookspec
def overflowml_objections(plan: Plan, network: Network, machine: Machine) -> Iterable[Objection] | None:  # type: ignore[empty-body]
    """Name known traps that this plan would step into.

    Called by the session for every plan that was made. All answers are joined; what they name is excluded, and planning runs again, until
    nobody objects. None and an empty list both mean: no objection. Pure.

    Args:
        plan: what was decided.
        network: what it was decided for.
        machine: where it would run.

    Default: the built-in plugin asks ``overflowml_core.traps``.
    """


# ---- mechanism


@hookspec(firstresult=True)
def overflowml_codec(format: Format, machine: Machine) -> Codec | None:
    """Convert weights into a format that :func:`overflowml_formats` named.

    Called by the session once for every format of a plan that is to be carried out, and of a plan for a model that can be loaded, right
    after it was made. Stops at the first answer that is not None; None means: not my format, or it does not work here. A format for which
    nobody answers is left out, and planning runs again.

    Args:
        format: as it was named; only one whose ``parts`` are known can be carried out.
        machine: which devices there are.

    Default: none; implemented for real in ``overflowml_torchao``.
    """


@hookspec(firstresult=True)
def overflowml_components(target: object) -> dict[str, object] | None:
    """Name the modules of a live object as its description names them.

    Called by the session right before a plan is attached. Stops at the first answer that is not None; None means: not mine.

    Args:
        target: a live module or pipeline.

    Default: the built-in plugin answers ``{"model": target}`` for any ``torch.nn.Module``.
    """


@hookspec
def overflowml_attached(target: object, attachment: Attachment) -> None:
    """Do what a host needs beyond the streaming of its modules.

    Called by the session right after a plan was attached; all plugins, each looks whether the target is its own. What is done here is
    undone in functions given to ``attachment.on_detach``. An exception detaches the plan again and reaches the user.

    Args:
        target: the model or pipeline.
        attachment: the engine at work on it.

    Implemented for real in ``overflowml_diffusers`` (execution device of a pipeline, guarded methods).
    """


# ---- hosts


@hookspec
def overflowml_install_host() -> None:
    """Put this plugin's requests (``overflow=``, ``device_map="overflowml"``) into its host.

    Called once by ``overflowml.install``. All plugins. Must not import a host that is not imported yet: wait for its import instead
    (``overflowml_core.patching.after_import``).
    """


@hookspec
def overflowml_uninstall_host() -> None:
    """Take everything back that ``overflowml_install_host`` changed, exactly.

    Called once by ``overflowml.uninstall``. All plugins.
    """


# ---- watchers


@hookspec
def overflowml_planned(plan: Plan) -> None:
    """A plan was made. All plugins; answers are ignored, exceptions are logged."""


@hookspec
def overflowml_progress(loading: Loading | None, done_bytes: int, total_bytes: int) -> None:
    """Weights are being brought in: bytes so far, bytes in all. All plugins; answers are ignored, exceptions are logged.

    Called once for every block and often, from the thread that loads: return quickly.
    """


@hookspec
def overflowml_ran(plan: Plan, report: Estimate) -> None:
    """A plan was detached, with what was measured while it ran. All plugins; answers are ignored, exceptions are logged."""


@hookspec
def overflowml_register_commands(app: object) -> None:
    """Add commands to the command line.

    Called once, when the help is asked for or a command that the project itself does not have. All plugins; an exception is logged and
    costs the plugin its commands, nothing else.

    Args:
        app: the ``typer.Typer`` application.
    """
