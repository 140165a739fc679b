"""The front door: run AI models larger than the GPU.

``import overflowml`` puts ``overflow=`` and ``device_map="overflowml"`` into diffusers and transformers, whether they are
imported before or after. It imports neither of them, and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from overflowml._version import __version__
from overflowml_core import environment as _environment
from overflowml_core import session as _session
from overflowml_core.errors import DoesNotFit, OverflowmlError
from overflowml_core.facts import Limits, Machine, Network, Workload
from overflowml_core.guard import MemoryGuard
from overflowml_core.plan import Plan

if TYPE_CHECKING:
    from overflowml_core.batches import Batch
    from overflowml_core.protocols import Attachment

__all__ = [
    "DoesNotFit",
    "Limits",
    "Machine",
    "MemoryGuard",
    "Network",
    "OverflowmlError",
    "Plan",
    "Workload",
    "__version__",
    "attachment",
    "auto_batch",
    "describe",
    "detect",
    "install",
    "manage",
    "optimize_model",
    "optimize_pipeline",
    "plan",
    "release",
    "uninstall",
]

_Item = TypeVar("_Item")


def install() -> None:
    """Put ``overflow=`` and ``device_map="overflowml"`` into the hosts. A second call does nothing.

    Happens by itself at import, unless the environment variable OVERFLOWML_DISABLE is set.
    """
    _session.install()


def uninstall() -> None:
    """Leave the hosts' functions exactly as they were. Models that are managed stay so."""
    _session.uninstall()


def detect() -> Machine:
    """This machine as plans see it: accelerators, RAM as this process may use it, disk."""
    return _session.detect()


def describe(source: str | os.PathLike[str] | object, workload: Workload | None = None, **options: object) -> Network:
    """What a model consists of, and what its passes compute and hold: components, blocks, bytes, operations. No weight is read.

    Args:
        source: a folder, the id of a Hub repository, a .gguf or .safetensors file, a size ("40GB", or 40 for so many GB), a live module
            or a live pipeline.
        workload: what it is profiled for.
        options: as the host's ``from_pretrained`` would take them (``dtype=torch.bfloat16``).

    Raises:
        OverflowmlError: the source is no model, or its files are broken.
    """
    return _session.describe(source, workload, options)


def plan(
    source: str | os.PathLike[str] | object,
    overflow: object = True,
    workload: Workload | None = None,
    machine: Machine | None = None,
    **options: object,
) -> Plan:
    """The plan that ``from_pretrained(source, overflow=...)`` would carry out, before anything is loaded.

    Behind a size, a GGUF file or a single safetensors file there is no model that a host would load this way: their plan is a forecast,
    which may use all that the planner knows.

    Args:
        source: as for :func:`describe`.
        overflow: True, a size such as "8GB", or Limits.
        workload: what the model will be asked to do.
        machine: plan for this one instead of the one that runs.
        options: as the host's ``from_pretrained`` would take them (``dtype=torch.bfloat16``).

    Raises:
        DoesNotFit: no plan respects the limits; says how many bytes are short and what would help.
        OverflowmlError: the source or a size is wrong.
    """
    limits = Limits.of(overflow)
    network = _session.describe(source, workload, options)
    return _session.make_plan(network, limits, workload, machine, forecast=_session.is_forecast(source))


def manage(target: object, overflow: object = True, workload: Workload | None = None) -> Attachment:
    """Plan for a loaded model or pipeline and carry the plan out.

    Args:
        target: a torch module, a transformers model, a diffusers pipeline.
        overflow: True, a size such as "8GB", or Limits.
        workload: what the model will be asked to do.

    Returns:
        The attachment; its ``plan`` says what is where, its ``report()`` what was measured.

    Raises:
        DoesNotFit: no plan respects the limits; the target is as it was.
        OverflowmlError: it is managed already, or cannot be.
    """
    return _session.manage(target, Limits.of(overflow), workload)


def optimize_pipeline(
    pipe: object, model_size_gb: float | None = None, *, overflow: object = True, workload: Workload | None = None
) -> Attachment:
    """Plan for a loaded pipeline and carry the plan out; :func:`manage` under the name that many scripts use.

    Args:
        pipe: a diffusers pipeline.
        model_size_gb: size of the weights in GB. It is measured anyway; one that is off by more than a tenth is logged as a warning.
        overflow: True, a size such as "8GB", or Limits.
        workload: what the pipeline will be asked to do.

    Returns:
        The attachment; ``summary()`` is its plan in words.

    Raises:
        BadSize: ``model_size_gb`` is no size.
        DoesNotFit, OverflowmlError: as for :func:`manage`; the pipeline is as it was.
    """
    return _session.optimize(pipe, model_size_gb, Limits.of(overflow), workload)


def optimize_model(
    model: object, model_size_gb: float | None = None, *, overflow: object = True, workload: Workload | None = None
) -> Attachment:
    """The same for a torch module or a transformers model; see :func:`optimize_pipeline`."""
    return _session.optimize(model, model_size_gb, Limits.of(overflow), workload)


def auto_batch(
    items: Iterable[_Item],
    pipe_or_model: object | None = None,
    batch_size: int | None = None,
    max_batch_size: int = 64,
    cleanup_between: bool | MemoryGuard = True,
) -> Iterator[Batch[_Item]]:
    """Batches of items that fit into memory, in order and each item once.

    The first size is predicted from the plan of a managed pipeline or model; elsewhere it is 1. It grows while batches succeed and
    what they took of the device leaves room, and is halved where memory runs out inside ``with batch:``::

        for batch in overflowml.auto_batch(prompts, pipe):
            with batch:
                for index, image in enumerate(pipe(batch).images, batch.first):
                    image.save(f"{index}.png")

    Args:
        items: prompts, mostly; no more of them are taken than the next batch needs.
        pipe_or_model: what will run them.
        batch_size: items of the first batch and at most of any, in place of a prediction.
        max_batch_size: items of any batch, at most.
        cleanup_between: clean between batches where memory is crowded; a :class:`MemoryGuard` does it by its own threshold.

    Raises:
        BadLimits: the items are a single text, or a size is no whole number from 1.
    """
    from overflowml_core.batches import auto_batch as cut

    return cut(items, pipe_or_model, batch_size, max_batch_size, cleanup_between)


def attachment(target: object) -> Attachment | None:
    """The plan at work on a model or pipeline, None where it is not managed."""
    return _session.attachment(target)


def release(target: object) -> bool:
    """Give a managed model or pipeline back as it was, with plain weights; False where it was not managed."""
    return _session.release(target)


def __getattr__(name: str) -> object:
    if name != "ray":
        raise AttributeError(f"module 'overflowml' has no attribute {name!r}")
    import importlib

    return importlib.import_module("overflowml.ray")  # what it needs is imported by whoever asks for it


if not _environment.disabled():
    install()
