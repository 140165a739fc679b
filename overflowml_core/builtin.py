"""The default implementation of each hook: a plugin like any other, asked last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overflowml_core.facts import Accelerator, Limits, Machine, Network, Workload, network_fingerprint
from overflowml_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from overflowml_core.formats import Format
    from overflowml_core.plan import Plan
    from overflowml_core.traps import Objection


def _is_module(source: object) -> bool:
    # Without importing torch: whoever holds a module has imported it already.
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


@hookimpl(trylast=True)
def overflowml_accelerators() -> list[Accelerator]:
    """CUDA, ROCm, XPU, MPS and whatever else torch drives."""
    from overflowml_core.inspect.accelerators import find_accelerators

    return find_accelerators()


@hookimpl(trylast=True)
def overflowml_describe(source: object, workload: Workload) -> Network | None:
    """Any torch module, by its structure alone; nothing is known of its activations."""
    if not _is_module(source):
        return None
    from overflowml_core.runtime.component import describe_module

    component = describe_module(source, "model")  # type: ignore[arg-type]
    name = type(source).__name__
    return Network((component,), f"a live {name}", name, network_fingerprint((component,)))


@hookimpl(trylast=True)
def overflowml_plan(
    network: Network, machine: Machine, workload: Workload, limits: Limits, formats: tuple[Format, ...], abilities: frozenset[str]
) -> Plan:
    """The planner of the core."""
    from overflowml_core.planner import make_plan

    return make_plan(network, machine, workload, limits, formats, abilities)


@hookimpl(trylast=True)
def overflowml_objections(plan: Plan, network: Network, machine: Machine) -> list[Objection]:
    """The catalog of known traps."""
    from overflowml_core.traps import objections

    return objections(plan, network, machine)


@hookimpl(trylast=True)
def overflowml_components(target: object) -> dict[str, object] | None:
    """A module is its own only component."""
    return {"model": target} if _is_module(target) else None
