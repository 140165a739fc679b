"""Which component and which block is running in a trace, and what each of them did. Knows no operation and no tensor's data."""

from __future__ import annotations

from dataclasses import dataclass, field

from overflowml_core.runtime.fake_memory import LiveMemory
from overflowml_core.runtime.probe_works import Ledger, tensors_in
from overflowml_core.runtime.structure import DTYPE_NAMES
from overflowml_core.work import BlockWork, Work


@dataclass(frozen=True, slots=True)
class Call:
    """One outermost call of a watched component.

    Attributes:
        component: the name that it is watched under.
        method: "forward", or the method that was called.
        label: its tensor arguments as text; equal for calls with equal arguments.
        activation_bytes: most bytes live at once while it ran, those of before included, weights not.
        entry_bytes: bytes that were live when it was called, its arguments included.
        blocks: work of each block, in the order of :func:`~overflowml_core.runtime.structure.own_blocks`.
        outside: work outside the blocks.
        exit_bytes: bytes live when it returned, its result included.
        guesses: values that it read from tensors that have none, and that were taken as zero.
    """

    component: str
    method: str
    label: str
    activation_bytes: int
    entry_bytes: int
    blocks: tuple[BlockWork, ...]
    outside: tuple[Work, ...]
    exit_bytes: int = 0
    guesses: int = 0

    @property
    def flop(self) -> int:
        """Floating-point operations of the call."""
        return sum(block.flop for block in self.blocks) + sum(work.flop for work in self.outside)


@dataclass(slots=True)
class _Running:
    """A component's call while it runs."""

    component: str
    method: str
    label: str
    entry_bytes: int
    guesses: int
    mark: int
    blocks: list[_BlockNotes]
    outside: Ledger = field(default_factory=Ledger)


@dataclass(slots=True)
class _BlockNotes:
    """What one block did in the call so far."""

    ledger: Ledger = field(default_factory=Ledger)
    activation_bytes: int = 0
    calls: int = 0


@dataclass(slots=True)
class _Inside:
    """A block that is running."""

    notes: _BlockNotes
    entry_bytes: int
    mark: int
    operations: int = 0


class CallBook:
    """Calls of components and blocks as they begin and end.

    Attributes:
        calls: finished outermost calls of components, in order.
        guesses: values that were read from tensors that have none, so far.
        operations: of the innermost block that is running, so far.
    """

    def __init__(self, memory: LiveMemory) -> None:
        self.calls: list[Call] = []
        self.guesses = 0
        self._memory = memory
        self._counts: dict[str, int] = {}
        self._running: _Running | None = None
        self._inside: list[_Inside] = []
        self._depth = 0

    def expect(self, component: str, block_count: int) -> None:
        """A component of this name, with so many blocks, may be called from now on."""
        self._counts[component] = block_count

    @property
    def ledger(self) -> Ledger | None:
        """Where the next operation belongs: to the innermost block, else to the call outside its blocks; None between calls."""
        if self._running is None:
            return None
        return self._inside[-1].notes.ledger if self._inside else self._running.outside

    def count_operation(self) -> int:
        """One more operation happens; how many it is in the innermost running block, 0 outside of blocks."""
        if not self._inside:
            return 0
        self._inside[-1].operations += 1
        return self._inside[-1].operations

    def enter(self, component: str, method: str, arguments: object) -> None:
        """A component's method is called. Inside another call it is a part of that one."""
        if self._running is not None:
            self._depth += 1
            return
        tensors = tensors_in(arguments)
        for tensor in tensors:
            self._memory.track(tensor)
        label = ", ".join(f"{'x'.join(map(str, t.shape)) or '1'} {DTYPE_NAMES.get(t.dtype, t.dtype)}" for t in tensors)
        notes = [_BlockNotes() for _ in range(self._counts[component])]
        self._running = _Running(component, method, label, self._memory.current, self.guesses, self._memory.begin(), notes)

    def leave(self) -> None:
        """The call that was entered last returns, or fails."""
        running = self._running
        if running is None:
            return
        if self._depth:
            self._depth -= 1
            return
        self._running = None
        self._inside.clear()
        peak = self._memory.end(running.mark)
        self.calls.append(
            Call(
                component=running.component,
                method=running.method,
                label=running.label,
                activation_bytes=peak,
                entry_bytes=running.entry_bytes,
                blocks=tuple(BlockWork(notes.ledger.works(), notes.activation_bytes, notes.calls) for notes in running.blocks),
                outside=running.outside.works(),
                exit_bytes=self._memory.current,
                guesses=self.guesses - running.guesses,
            )
        )

    def enter_block(self, component: str, index: int) -> None:
        """A block is called; one of another component than the one that runs is noted nowhere."""
        running = self._running
        known = running is not None and running.component == component
        notes = running.blocks[index] if running is not None and known else _BlockNotes()
        notes.calls += 1
        self._inside.append(_Inside(notes, self._memory.current, self._memory.begin()))

    def leave_block(self) -> None:
        """The block that was entered last returns, or fails."""
        if self._inside:
            inside = self._inside.pop()
            grown = self._memory.end(inside.mark) - inside.entry_bytes
            inside.notes.activation_bytes = max(inside.notes.activation_bytes, grown)

    def close(self) -> None:
        """Forget what is running; what has finished stays."""
        self._running = None
        self._inside.clear()
