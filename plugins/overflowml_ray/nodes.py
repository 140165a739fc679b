"""Who can work: asks each node for its versions, and lists one seat for each accelerator, or one for a node without any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PACKAGES = ("overflowml", "torch", "diffusers", "transformers")
"""Whose versions must be the same everywhere: pictures would differ, or calls fail."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A place for one worker.

    Attributes:
        name: for people: the host, the node, and the accelerator where there is one.
        node: Ray's id of the node.
        accelerators: that Ray counts for it: 1, or 0 where the processor computes.
        cores: that Ray reserves for it.
        on_node: seats on this node in all, which share its memory.
    """

    name: str
    node: str
    accelerators: int
    cores: float
    on_node: int


def seats_of(node: Mapping[str, Any]) -> list[Seat]:
    """The seats of a node as ``ray.nodes()`` has it."""
    resources, host = node.get("Resources", {}), str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress") or "node")
    cards, cores = int(resources.get("GPU", 0)), float(resources.get("CPU", 0))
    short = f"{host} ({node['NodeID'][:8]})"
    if cards:
        each = min(1.0, cores / cards)
        return [Seat(f"{short} accelerator {index}", node["NodeID"], 1, each, cards) for index in range(cards)]
    return [Seat(short, node["NodeID"], 0, cores, 1)] if cores else []


def at_node(node: str) -> Any:
    """How Ray is told to start something on this node and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def versions_here() -> dict[str, str]:
    """Versions of the packages that must be the same, and of Python. What is not installed is left out."""
    return _asking()()


def question() -> Callable[[], dict[str, str]]:
    """What is asked of each node. It is sent as code and not by its name, for the package may be missing there, or another version."""
    return _asking()


def _asking() -> Callable[[], dict[str, str]]:
    packages = PACKAGES

    def versions() -> dict[str, str]:
        import contextlib
        import importlib
        import importlib.metadata
        import platform

        found = {"python": ".".join(platform.python_version_tuple()[:2])}
        for name in packages:
            with contextlib.suppress(ImportError):
                if name == "overflowml":
                    found[name] = importlib.import_module("overflowml._version").__version__
                else:
                    found[name] = importlib.metadata.version(name)
        return found

    return versions


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs, in words; empty where nothing does."""
    unlike = [name for name in ("python", *PACKAGES) if ours.get(name) != theirs.get(name)]
    said = [f"{name} is {theirs.get(name, 'not installed')} there and {ours.get(name, 'not installed')} here" for name in unlike]
    return ", ".join(said)
