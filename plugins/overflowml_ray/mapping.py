"""``overflowml.ray.map``: a function over items by all accelerators of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from overflowml_ray.connection import connected
from overflowml_ray.crew import Crew
from overflowml_ray.nodes import Seat

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_log = logging.getLogger("overflowml")


@dataclass
class FunctionWork:
    """A function, and what loads what it needs."""

    function: Callable[..., Any]
    load: Callable[[], Any] | None

    def open(self, seat: Seat) -> OpenFunction:
        """Load what the function needs, once in each worker."""
        return OpenFunction(self.function, () if self.load is None else (self.load(),))

    def unit_s(self) -> float | None:
        """Nobody knows before it ran."""
        return None


@dataclass
class OpenFunction:
    """The function at a worker."""

    function: Callable[..., Any]
    loaded: tuple[Any, ...]

    def do(self, task: Any) -> Any:
        """Its result for an item."""
        return self.function(*self.loaded, task)


def map(
    function: Callable[..., _Made],
    items: Iterable[_Item],
    address: str = "auto",
    *,
    load: Callable[[], object] | None = None,
    costs: Callable[[_Item], float] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> list[_Made]:
    """Call a function for each item on a cluster: one worker for each accelerator, or for each node without any.

    Items are pulled, so that fast workers do more. What a worker held that ended is done by another one, so a function may be called twice
    for an item; of its results one counts. ::

        def load():
            return DiffusionPipeline.from_pretrained("path/to/flux", overflow=True)  # plans for the node where it runs

        def draw(pipe, prompt):
            return pipe(prompt).images[0]

        images = overflowml.ray.map(draw, prompts, "auto", load=load)

    Args:
        function: takes an item, or what ``load`` gave and an item.
        items: what it is called for.
        address: "local", "auto" or "HOST:PORT".
        load: called once in each worker.
        costs: what an item takes, in any unit; all take the same by default.
        tell: told after each result how many are there, and how many there will be.

    Returns:
        Results in the order of the items.

    Raises:
        NoCluster: Ray is missing, or nothing answers at the address.
        TaskFailed: the function failed twice for an item; the message holds its errors.
        NobodyLeft: no worker is left.
    """
    asked = list(items)
    found: dict[int, Any] = {}

    def keep(task: int, value: Any) -> None:
        found[task] = value
        if tell is not None:
            tell(len(found), len(asked))

    with connected(address) as ray:
        crew = Crew(ray, FunctionWork(function, load), asked, lambda task: f"item {task}", _log.warning)
        if asked:
            crew.run([1.0 if costs is None else costs(one) for one in asked], keep)
    return [found[task] for task in range(len(asked))]
