"""What can go wrong with a cluster: what ends the work, and what sets one worker aside."""

from __future__ import annotations

from collections.abc import Mapping

from overflowml_core.errors import OverflowmlError


class NoCluster(OverflowmlError):
    """Ray is not installed, or there is no cluster at the address."""

    def __init__(self, address: str, problem: str, remedy: str) -> None:
        self.address, self.problem = address, problem
        super().__init__(f"--ray={address!r}: {problem}; {remedy}")


class NobodyLeft(OverflowmlError):
    """All workers were set aside or are gone before the work was done.

    Attributes:
        reasons: by worker.
    """

    def __init__(self, reasons: Mapping[str, str], left: int) -> None:
        self.reasons, self.left = dict(reasons), left
        said = (
            "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items()) or "the cluster has no node with a processor to spare"
        )
        super().__init__(f"no worker is left for {left} tasks ({said}); what is done stays: set this right and run the same again")


class TaskFailed(OverflowmlError):
    """A task that several workers could not do, or that ended them."""

    def __init__(self, task: str, problem: str) -> None:
        self.task = task
        super().__init__(f"{task}: {problem}; what is done stays: change or remove it, and run the same again")


class WorkRefused(OverflowmlError):
    """A worker says that the work itself is wrong; no other worker would do it."""


class SetAside(OverflowmlError):
    """Raised at a worker: it cannot go on, and another one may. Its node is named, and the task is done elsewhere.

    Attributes:
        whole_node: whether the other workers of the node cannot go on either.
    """

    def __init__(self, reason: str, whole_node: bool = False) -> None:
        self.reason, self.whole_node = " ".join(reason.splitlines()), whole_node
        super().__init__(self.reason)

    def __reduce__(self) -> tuple[object, ...]:
        return SetAside, (self.reason, self.whole_node)
