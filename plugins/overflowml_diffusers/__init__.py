"""diffusers as a host: pipelines and models by ``overflow=``. Hook implementations, a few lines each; imports neither
torch nor the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from overflowml_core.hookspecs import hookimpl
from overflowml_core.requirements import require

if TYPE_CHECKING:
    from overflowml_core.facts import Network, Workload
    from overflowml_core.protocols import Attachment


def _is_pipeline(source: object) -> bool:
    host = sys.modules.get("diffusers.pipelines.pipeline_utils")
    return host is not None and isinstance(source, host.DiffusionPipeline)


def _is_model(source: object) -> bool:
    host = sys.modules.get("diffusers.models.modeling_utils")
    return host is not None and isinstance(source, host.ModelMixin)


@hookimpl
def overflowml_describe(source: object, workload: Workload, options: dict[str, object]) -> Network | None:
    """A diffusers pipeline or model, live or in a folder."""
    if isinstance(source, (str, Path)):
        from overflowml_core.inspect import kind_of_folder

        kind = kind_of_folder(Path(source) / str(options.get("subfolder") or ""))
        if kind not in ("diffusers-pipeline", "diffusers-model"):
            return None
        require(f"{source}: a {kind.replace('-', ' ')}", "diffusers", "torch", "diffusers", "transformers", "accelerate")
        from overflowml_diffusers.describe import describe_folder

        return describe_folder(Path(source), kind, workload, options)
    if _is_pipeline(source):
        from overflowml_diffusers.describe import describe_pipeline

        return describe_pipeline(source, workload)
    if _is_model(source):
        from overflowml_diffusers.describe import describe_model

        return describe_model(source, workload)
    return None


@hookimpl
def overflowml_measure(source: object, network: Network, workload: Workload, options: dict[str, object]) -> Network | None:
    """The passes of a diffusers pipeline or model, traced without data."""
    if isinstance(source, (str, Path)):
        from overflowml_core.inspect import kind_of_folder

        kind = kind_of_folder(Path(source) / str(options.get("subfolder") or ""))
        if kind not in ("diffusers-pipeline", "diffusers-model"):
            return None
        from overflowml_diffusers.describe import build_folder

        source, _ = build_folder(Path(source), kind, options)
    if not _is_pipeline(source) and not _is_model(source):
        return None
    from overflowml_diffusers.profile import measure_model, measure_pipeline

    return (measure_pipeline if _is_pipeline(source) else measure_model)(source, network, workload)


@hookimpl
def overflowml_components(target: object) -> dict[str, object] | None:
    """The modules of a pipeline, in the order in which they run."""
    if not _is_pipeline(target):
        return None
    from overflowml_diffusers.describe import ordered_modules

    return ordered_modules(target)


@hookimpl
def overflowml_attached(target: object, attachment: Attachment) -> None:
    """Tell diffusers where a pipeline runs, and guard what would move it."""
    if attachment.plan.managed and (_is_pipeline(target) or _is_model(target)):
        from overflowml_diffusers.attach import after_attach

        after_attach(target, attachment)


@hookimpl
def overflowml_install_host() -> None:
    """Patch the host now or when it is imported."""
    from overflowml_diffusers import host

    host.install()


@hookimpl
def overflowml_uninstall_host() -> None:
    """Leave the host as it was."""
    from overflowml_diffusers import host

    host.uninstall()
