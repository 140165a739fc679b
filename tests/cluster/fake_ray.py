"""What the project asks of Ray, in one process and in order: a call is made when somebody waits for it. Nodes and processes can end."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """Base of Ray's errors."""


class ActorDiedError(RayError):
    """The process of an actor ended."""


class TaskCancelledError(RayError):
    """A call that was taken back."""


class ProcessEnds(BaseException):
    """Raised by what runs in an actor: its process ends here."""


class Ref:
    """The result of a call that may not have been made yet."""

    def __init__(self, call: Any, actor: Actor | None = None) -> None:
        self.call, self.actor, self.outcome = call, actor, None

    def make(self) -> None:
        """Make the call, as its actor would."""
        if self.outcome is not None:
            return
        try:
            if self.actor is not None and self.actor.is_dead:
                raise ActorDiedError("The actor died unexpectedly before finishing this task.")
            value = self.call()
            if self.actor is not None and self.actor.is_dead:  # its node ended meanwhile
                raise ActorDiedError("The actor died because its node has died.")
            self.outcome = True, value
        except ProcessEnds:
            self.actor.is_dead = True
            self.outcome = False, ActorDiedError("The actor died because its worker process has died.")
        except Exception as error:  # noqa: BLE001 -- as Ray does
            self.outcome = False, error


class Actor:
    """A handle."""

    def __init__(self, ray: FakeRay, kind: type, arguments: tuple[Any, ...], node: str) -> None:
        self.it, self.is_dead, self.node, self.ray = kind(*arguments), False, node, ray
        ray.actors.append(self)

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Ref:
            values = [self.ray.get(one) if isinstance(one, Ref) else one for one in arguments]
            values = [pickle.loads(pickle.dumps(one)) if isinstance(one, tuple) else one for one in values]
            return Ref(lambda: getattr(self.it, name)(*values), self)

        return SimpleNamespace(remote=remote)


class FakeRay:
    """Stands for the module."""

    def __init__(self, nodes: int) -> None:
        names = [f"{index:08d}" for index in range(nodes)]
        self.node_list: list[dict[str, Any]] = [
            {"NodeID": name, "NodeManagerHostname": f"host{int(name)}", "Alive": True, "Resources": {"CPU": 1.0}} for name in names
        ]
        self.actors: list[Actor] = []
        self.exceptions = SimpleNamespace(RayError=RayError, TaskCancelledError=TaskCancelledError)
        self.turn = 0

    def nodes(self) -> list[dict[str, Any]]:
        """As Ray has them."""
        return self.node_list

    def end_node(self, name: str) -> None:
        """A node ends with all of its processes."""
        for node in self.node_list:
            if node["NodeID"] == name:
                node["Alive"] = False
        for actor in self.actors:
            actor.is_dead |= actor.node == name

    def put(self, value: Any) -> Ref:
        """An object."""
        return Ref(lambda: value)

    def remote(self, what: Any) -> Any:
        """A function or a class that is called elsewhere."""

        def options(scheduling_strategy: str = "", **_: Any) -> Any:
            def call(*arguments: Any) -> Any:
                if isinstance(what, type):
                    return Actor(self, what, arguments, scheduling_strategy)
                return Ref(lambda: what(*arguments))

            return SimpleNamespace(remote=call)

        return SimpleNamespace(options=options)

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        """One becomes ready at a time: the oldest call of each actor, and the actors in turn."""
        ready = [one for one in refs if one.outcome is not None]
        if not ready and timeout:
            first: dict[int, Ref] = {}
            for one in refs:
                first.setdefault(id(one.actor), one)
            self.turn += 1
            ready = [list(first.values())[self.turn % len(first)]]
            ready[0].make()
        return ready[:num_returns], [one for one in refs if one not in ready[:num_returns]]

    def get(self, ref: Ref) -> Any:
        """The result."""
        ref.make()
        is_good, value = ref.outcome
        if not is_good:
            raise value
        return value

    def cancel(self, ref: Ref) -> None:
        """Take a call back that was not made."""
        if ref.outcome is None:
            ref.outcome = False, TaskCancelledError()

    def kill(self, actor: Actor) -> None:
        """End a process."""
        actor.is_dead = True

    def get_runtime_context(self) -> Any:
        """Of the driver."""
        return SimpleNamespace(get_node_id=lambda: self.node_list[0]["NodeID"])
