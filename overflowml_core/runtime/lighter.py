"""Lighter calls: what a host can change of a component, so that its calls take less memory, and when that is taken back. Changes nothing
itself."""

from __future__ import annotations

from typing import Any, Protocol


class Lighten(Protocol):
    """A host's ways of having a component take less memory in its calls."""

    def step(self, values: tuple[Any, ...]) -> str:
        """Go one step further.

        Args:
            values: the arguments of the call that ran out of memory.

        Returns:
            What was done, and whether results stay the same, in words; empty where there is nothing left to do.
        """
        ...

    def undo(self) -> None:
        """Take all steps back. A second call does nothing."""
        ...


class Lighter:
    """The steps that were taken for one component.

    Attributes:
        is_on: at least one step was taken.
        is_due: they were there for as many good calls as they wait for, and may be tried without.
    """

    def __init__(self, host: Lighten, patience_calls: int, most_patience_calls: int) -> None:
        """Nothing is taken yet.

        Args:
            host: takes the steps.
            patience_calls: good calls before they are taken back; twice as many each time that this was too early.
            most_patience_calls: at most.
        """
        self._host = host
        self._patience_calls, self._most_patience_calls = patience_calls, most_patience_calls
        self._good_calls = 0
        self._is_probation = False
        self.is_on = False

    @property
    def is_due(self) -> bool:
        """See above."""
        return self.is_on and self._good_calls >= self._patience_calls

    def step(self, values: tuple[Any, ...]) -> str:
        """Have the host take a step; see :meth:`Lighten.step`."""
        told = self._host.step(values)
        if told:
            if self._is_probation:
                self._patience_calls = min(2 * self._patience_calls, self._most_patience_calls)
            self.is_on, self._is_probation, self._good_calls = True, False, 0
        return told

    def succeeded(self) -> None:
        """A call was done."""
        self._good_calls += 1
        self._is_probation = False

    def take_back(self) -> None:
        """Take all steps back, for the time being."""
        self._host.undo()
        self.is_on, self._is_probation, self._good_calls = False, True, 0
