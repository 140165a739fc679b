"""What a mechanism plugin hands over. Imports nothing at run time but the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from overflowml_core.facts import Network
    from overflowml_core.plan import Estimate, Plan


@runtime_checkable
class Attachment(Protocol):
    """A plan at work on a model or pipeline, until it is detached."""

    plan: Plan
    network: Network

    def report(self) -> Estimate:
        """What was measured so far, in the fields of the plan's estimate."""
        ...

    def summary(self) -> str:
        """The plan in words, for a terminal."""
        ...

    def detach(self) -> bool:
        """Give the model back as it was, bit for bit, and free what was allocated, once the calls of other threads are over.

        Returns:
            Whether this call did it. A second call does nothing.

        Raises:
            OverflowmlError: this thread is inside a call of the model, or the process was forked from that of the model.
        """
        ...
