"""What people do to a managed model after the attachment: adapters come and go, weights are edited or replaced. Before the next pass
everything is where it belongs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from overflowml_core.errors import Unsupported
from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.edits import Edits, Marks, Place
from overflowml_core.runtime.folding import follow_folds
from overflowml_core.runtime.guests import Arrivals, move
from overflowml_core.runtime.parts import is_plain
from overflowml_core.runtime.phase import Phase
from overflowml_core.runtime.rearrange import Held
from overflowml_core.runtime.room import with_room
from overflowml_core.runtime.structure import Owner
from overflowml_core.runtime.turns import Turns

_log = logging.getLogger("overflowml")


class Changes:
    """Follows changes of one engine's modules.

    Note [taking stock]. Looking whether there is anything to do costs a few microseconds a pass. Where there is, the phase on the device
    leaves first, so that every weight is at home; the pass that asked brings it in again, guests included.
    """

    def __init__(
        self,
        edits: Edits,
        budget_bytes: int,
        leave: Callable[[], None],
        go_under: Callable[[Phase, PhasePlan], None],
        turns: Turns,
    ) -> None:
        """Follow nothing yet.

        Args:
            edits: gives edited units their homes.
            budget_bytes: of the plan.
            leave: has whatever phase is on the device leave it.
            go_under: has a phase that is not on the device go on under another plan.
            turns: waited for before a phase leaves.
        """
        self._edits = edits
        self._budget_bytes = budget_bytes
        self._leave = leave
        self._go_under = go_under
        self._turns = turns
        self._arrivals: Arrivals | None = None
        self._held: Sequence[Held] = ()
        self._phases: Sequence[Phase] = ()
        self._marks: dict[int, Marks] = {}
        self._shrunk: dict[int, tuple[PhasePlan, PhasePlan]] = {}
        """By id of a phase that makes room for guests: its plan before, and the one since."""
        self._end_folds: Callable[[], None] | None = None

    def begin(self, modules: Iterable[nn.Module], held: Sequence[Held], phases: Sequence[Phase]) -> None:
        """Follow these modules, whose weights are held like this, until :meth:`end`."""
        roots = list(modules)
        self._held, self._phases = held, phases
        self._arrivals = Arrivals(roots)
        meet, self._end_folds = follow_folds(self.editing)
        self._arrivals.listen(meet)
        for root in roots:
            for module in root.modules():
                meet(module)
        self.renew()

    def end(self) -> None:
        """Follow nothing any more. A second call does nothing."""
        if self._arrivals is not None:
            self._arrivals.close()
        if self._end_folds is not None:
            self._end_folds()
        self._arrivals, self._end_folds, self._held, self._phases, self._marks = None, None, (), (), {}

    def renew(self) -> None:
        """Take the weights as they are now for unedited."""
        self._marks = {id(phase): Marks((*phase.residents, *phase.streamer.homes)) for phase in self._phases}

    def holds(self, module: nn.Module, attribute: str) -> bool:
        """Whether a parameter is one of the plan's, not one that came later."""
        return (id(module), attribute) in self._places()

    def look(self, phase: Phase) -> None:
        """Before a pass of a phase: have everything where it belongs.

        Raises:
            DoesNotFit: what was added to a phase does not fit beside it.
            OverflowmlError: the packed store has no room for edited weights.
        """
        arrivals, marks = self._arrivals, self._marks.get(id(phase))
        if arrivals is None or marks is None:
            return
        if arrivals.changed or self._edits.is_open or marks.seen:
            with self._turns.switch, torch.inference_mode(False), torch.no_grad():
                self._turns.take(None)
                if self._arrivals is arrivals:  # not given back meanwhile; what another thread took stock of costs a second look
                    self._take_stock(arrivals)

    @contextlib.contextmanager
    def editing(self, module: nn.Module) -> Iterator[None]:
        """Let the weights of a module be changed in place: they are at home while the context is open, and what is added to the module is
        beside them.

        Raises:
            Unsupported: the module computes in another dtype for the time being.
        """
        if self._arrivals is None:
            yield
            return
        with self._turns.switch, torch.inference_mode(False):
            with torch.no_grad():
                self._turns.take(None)
                self._open(module)
            yield

    def _open(self, module: nn.Module) -> None:
        inside = {id(inner) for inner in module.modules()}
        units = [held for held in self._held if any(id(o.module) in inside for w in held.slab.unit.weights for o in w.owners)]
        for phase in self._phases:
            if phase.casts and any(inner is module for root in phase.modules for inner in root.modules()):
                raise Unsupported(
                    f"{type(module).__name__}: weights cannot be edited once {phase.plan.name} was cast while it is managed; "
                    "edit them before, or give the model back with overflowml.release first"
                )
        self._leave()
        self._edits.open(units)
        own = {id(o.module): o for held in units for w in held.slab.unit.weights for o in w.owners}
        known = [o.module._parameters[o.attribute] for key, o in own.items() if key in inside]
        device = next((p.device for p in known if p is not None), None)
        if device is not None:
            places = self._places()
            move((p for place, p in _parameters([module]) if place not in places and not p.is_meta), device)

    def _take_stock(self, arrivals: Arrivals) -> None:
        self._keep_flags()
        known = self._places()
        replaced = [(m, name, p) for m, name, p in arrivals.replaced if (id(m), name) in known]
        gone = {(id(m), name) for m, name, _ in replaced} | self._reshaped()
        for held in self._held:
            self._edits.let_go(held, gone)
        self._leave()
        for module, name, parameter in replaced:
            if name in module._parameters:
                module._parameters[name] = parameter  # a pass in between may have put the plan's own there
        self._edits.close()
        for marks in self._marks.values():
            edited = marks.seen_in()
            for held in self._held:
                if any(held.home is home for home in edited):
                    self._edits.settle(held)
        known = self._places()
        for phase in self._phases:
            phase.guests.admit({id(p): p for place, p in _parameters(phase.modules) if place not in known}.values())
            self._make_room(phase)
        arrivals.settled()
        self.renew()

    def _make_room(self, phase: Phase) -> None:
        before, since = self._shrunk.pop(id(phase), (phase.plan, phase.plan))
        if phase.plan != since:
            before = phase.plan  # somebody rearranged it meanwhile
        wanted_bytes = phase.guests.wanted_bytes(before)
        wanted = None if phase.casts else with_room(before, wanted_bytes, self._budget_bytes)
        if wanted is None:
            phase.guests.refuse(before, self._budget_bytes)
        elif wanted != phase.plan:
            blocks, nbytes = len(wanted.streamed) - len(before.streamed), max(before.staging_bytes - wanted.staging_bytes, 0)
            _log.info("%s: %d resident blocks and %d bytes of staging make room for what was added", before.name, blocks, nbytes)
            self._go_under(phase, wanted)
        if wanted is not None and wanted != before:
            self._shrunk[id(phase)] = (before, wanted)

    def _keep_flags(self) -> None:
        """Have a weight at home require a gradient where the one that stands for it does by now; hosts switch that when they add adapters,
        and torch chooses kernels by it."""
        for held in self._held:
            for weight, at_home in zip(held.slab.unit.weights, held.home.parameters, strict=True):
                shown = weight.owners[0].module._parameters.get(weight.owners[0].attribute)
                if shown is not None and shown.is_floating_point() and shown.dtype is at_home.dtype:
                    at_home.requires_grad_(shown.requires_grad)
                    weight.parameter.requires_grad_(shown.requires_grad)

    def _places(self) -> set[Place]:
        return {(id(o.module), o.attribute) for held in self._held for w in held.slab.unit.weights for o in w.owners}

    def _reshaped(self) -> set[Place]:
        """Places whose parameter is gone or has another shape than the plan's."""
        return {
            (id(owner.module), owner.attribute)
            for held in self._held
            for entry in held.slab.entries
            if is_plain(entry.weight.parameter)
            for owner in entry.weight.owners
            if _shape(owner) != entry.shape
        }


def _shape(owner: Owner) -> tuple[int, ...] | None:
    present = owner.module._parameters.get(owner.attribute)
    return None if present is None else tuple(present.shape)


def _parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[Place, nn.Parameter]]:
    for module in modules:
        for inner in module.modules():
            for attribute, parameter in inner._parameters.items():
                if parameter is not None:
                    yield (id(inner), attribute), parameter
