"""ComfyUI as a host: predictions for its models, for plans made by anybody who holds one. Imports neither torch nor the host.

The node pack (``comfyui_nodes``) is what users see; everything that it decides is here, and is tested without the host.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from overflowml_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from overflowml_core.facts import Network, Workload


def _is_model(source: object) -> bool:
    # Whoever holds a model of the host has imported torch already.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module) and type(source).__module__.startswith("comfy.")


@hookimpl
def overflowml_measure(source: object, network: Network, workload: Workload) -> Network | None:
    """What a model of the host computes and holds, by the shapes of its weights. Its code is run by nobody but the host."""
    if not _is_model(source):
        return None
    from overflowml_comfyui.profile import with_profiles

    return with_profiles(network, source, workload)
