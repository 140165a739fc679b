"""transformers as a host: models by ``overflow=`` and ``device_map="overflowml"``. Hook implementations, a few lines each;
imports neither torch nor the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from overflowml_core.hookspecs import hookimpl
from overflowml_core.requirements import require

if TYPE_CHECKING:
    from overflowml_core.facts import Network, Workload
    from overflowml_core.protocols import Attachment


def _is_model(source: object) -> bool:
    # Whoever holds a model has imported the host already.
    host = sys.modules.get("transformers.modeling_utils")
    return host is not None and isinstance(source, host.PreTrainedModel)


@hookimpl
def overflowml_describe(source: object, workload: Workload, options: dict[str, object]) -> Network | None:
    """A transformers model, live or in a folder."""
    if isinstance(source, (str, Path)):
        from overflowml_core.inspect import kind_of_folder

        if kind_of_folder(Path(source) / str(options.get("subfolder") or "")) != "transformers":
            return None
        require(f"{source}: a transformers model", "transformers", "torch", "transformers", "accelerate")
        from overflowml_transformers.describe import describe_folder

        return describe_folder(Path(source), workload, options)
    if not _is_model(source):
        return None
    from overflowml_transformers.describe import describe_model

    return describe_model(source, workload)


@hookimpl
def overflowml_measure(source: object, network: Network, workload: Workload, options: dict[str, object]) -> Network | None:
    """Run the model's own code on tensors without data, where the source is a transformers model."""
    if isinstance(source, (str, Path)):
        from overflowml_core.inspect import kind_of_folder

        if kind_of_folder(Path(source) / str(options.get("subfolder") or "")) != "transformers":
            return None
        from overflowml_transformers.describe import pattern_of_folder
        from overflowml_transformers.profile import measure_model

        return measure_model(pattern_of_folder(Path(source), options), network, workload)
    if not _is_model(source):
        return None
    from overflowml_transformers.describe import Pattern
    from overflowml_transformers.profile import measure_model

    return measure_model(Pattern.of(source), network, workload)


@hookimpl
def overflowml_attached(target: object, attachment: Attachment) -> None:
    """Tell transformers where the model runs, and guard what would move it."""
    if _is_model(target) and attachment.plan.managed:
        from overflowml_transformers.attach import after_attach

        after_attach(target, attachment)


@hookimpl
def overflowml_install_host() -> None:
    """Patch the host now or when it is imported."""
    from overflowml_transformers import host

    host.install()


@hookimpl
def overflowml_uninstall_host() -> None:
    """Leave the host as it was."""
    from overflowml_transformers import host

    host.uninstall()
