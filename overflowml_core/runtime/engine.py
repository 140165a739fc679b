"""A plan at work on live modules: homes, phases, hooks, and the way back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.codec import Codec
from overflowml_core.errors import Unsupported
from overflowml_core.expert_report import ExpertReport
from overflowml_core.expert_setting import ExpertSetting
from overflowml_core.facts import Network, Tier
from overflowml_core.loading import Loading
from overflowml_core.plan import Estimate, PhasePlan, Plan
from overflowml_core.runtime.changes import Changes
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.edits import Edits
from overflowml_core.runtime.elastic import Elastic
from overflowml_core.runtime.encode import encoded, show_originals
from overflowml_core.runtime.experts.apart import dense_format, take_out
from overflowml_core.runtime.experts.side import ExpertSide
from overflowml_core.runtime.feeder import LARGEST_WINDOW_BYTES, Feeder
from overflowml_core.runtime.forks import tell_of_fork
from overflowml_core.runtime.gradients import without_gradient
from overflowml_core.runtime.guards import guard_parts
from overflowml_core.runtime.homes import FileMaps, Home, original
from overflowml_core.runtime.hooking import hook_phase, unhook_blocks
from overflowml_core.runtime.leaves import taken_apart
from overflowml_core.runtime.matching import comes_in, match
from overflowml_core.runtime.phase import Phase, Stay, buffers_of
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.rearrange import BlockKey, Held, Mover, as_held, check_movable, check_same, set_up, take_down
from overflowml_core.runtime.recast import Cast, cast_phase, check_room
from overflowml_core.runtime.restoration import Namespaces, give_back, let_go
from overflowml_core.runtime.slab import Entry, lay_out
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.streamer import Streamer
from overflowml_core.runtime.structure import Unit, dissect
from overflowml_core.runtime.turns import Turns

_log = logging.getLogger("overflowml")

Progress = Callable[[int, int], None]
"""Called with bytes brought in so far, and in all."""


class Engine:
    """Runs modules by a plan until it is detached. See :class:`overflowml_core.protocols.Attachment`."""

    def __init__(
        self,
        plan: Plan,
        network: Network,
        device: Device,
        store_folder: Path,
        codecs: Mapping[str, Codec] | None = None,
        experts: ExpertSetting | None = None,
    ) -> None:
        self.plan = plan
        self.network = network
        self.device = device
        self._store_folder = store_folder
        self._codecs = codecs or {}
        self._reader = FileReader()
        self._maps = FileMaps()
        self._store: PackedStore | None = None
        largest_slot = max((phase.slot_bytes for phase in plan.phases), default=0)
        self._feeder = Feeder(device, self._reader, min(largest_slot or LARGEST_WINDOW_BYTES, LARGEST_WINDOW_BYTES * 4))
        self.experts = ExpertSide(device, self._feeder, self._maps, self._packed_store, experts or ExpertSetting())
        self._mover = Mover(device, self._feeder, self._maps, self._packed_store)
        self._held: list[Held] = []
        self._blocks: dict[BlockKey, Held] = {}
        self._phases: list[Phase] = []
        self._hooks: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._switch = threading.RLock()
        self._turns = Turns(self._switch, self._phases)
        edits = Edits(self._reader, self._maps, self._packed_store)
        self._changes = Changes(edits, plan.budget.device_bytes, self._deactivate, self._shrink, self._turns)
        self._elastic = Elastic(device, plan.budget.device_bytes, self._shrink, self._activate, self._turns)
        self.events, self.on_shortage = self._elastic.events, self._elastic.on_shortage
        self._detached = False
        tell_of_fork(self._forked)
        self._counted: ExpertReport | None = None
        self.measured_pass_s: float | None = None
        """Seconds of a pass of the phase that takes longest, where a trial measured it."""

    def attach(self, modules: Mapping[str, nn.Module], loading: Loading | None, progress: Progress | None = None) -> Engine:
        """Bring all weights to where the plan has them and hook the modules.

        Args:
            modules: the components by name, loaded or with weights that ``loading`` knows the origins of.
            loading: the load under way, None for modules that are loaded.
            progress: told how far it is.

        Raises:
            PlanMismatch: the plan was made for other modules.
            torch.OutOfMemoryError, ReadFault, OverflowmlError: nothing stays attached or allocated.
        """
        before = Namespaces(modules.values())
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.device.reset_peak()
                self._build(modules, loading, progress)
                self._changes.begin(modules.values(), self._held, self._phases)
                if self._phases:
                    self._activate(self._phases[0])
        except BaseException:
            self.experts.room_bytes = 0  # nobody gets this model; what was not read is not read for it
            self.detach()
            before.put_back()
            raise
        return self

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have something of a host's undone when the engine is detached; the latest first."""
        self._undo.append(undo)

    def _build(self, modules: Mapping[str, nn.Module], loading: Loading | None, progress: Progress | None) -> None:
        formats: dict[str, dict[str, str]] = {name: {} for name in modules}
        for place in self.plan.placements():
            formats.setdefault(place.component, {})[place.block] = dense_format(place)
        structures = {
            name: encoded(taken_apart(dissect(module), formats[name]), formats[name], self._codecs, loading)
            for name, module in modules.items()
        }
        structures, apart = take_out(structures, self.plan, self.network, self._codecs)
        self._hooks += show_originals(structures, self._original)
        placed = [place for phase_plan in self.plan.phases for place in match(phase_plan, structures)]
        total = sum(unit.slab_bytes for unit, _, home_tier in placed if comes_in(unit, home_tier, loading))
        total += sum(one.bank.record_bytes * one.bank.count for one in apart)
        done = 0

        def came(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        for phase_plan in self.plan.phases:
            placements = match(phase_plan, structures)
            streamed: list[Home] = []
            residents: list[Home] = []
            for unit, tier, home_tier in placements:
                held = self._settle(unit, home_tier, loading)
                if tier is not Tier.DEVICE:
                    streamed.append(held.home)
                elif held.arena is None:
                    residents.append(held.home)
                came(held.slab.nbytes * comes_in(unit, home_tier, loading))
            own_blocks = self._held[len(self._held) - len(phase_plan.placements) :]
            self._blocks.update(zip(((p.component, p.block) for p in phase_plan.placements), own_blocks, strict=True))
            streamer = self._streamer(phase_plan, streamed)
            phase = Phase(self.device, self._feeder, phase_plan, streamer, residents, [modules[name] for name in phase_plan.components])
            self._phases.append(phase)
            phase.conductor = self.experts.conduct(phase_plan, apart, loading, came)
            if phase.conductor is not None:
                self._hooks += self.experts.hook_lists(phase.conductor, apart, partial(self._activate, phase))
            own = {name: modules[name] for name in phase_plan.components}
            self._hooks += hook_phase(phase, own, structures, self._activate, takes_turns=len(self.plan.phases) > 1)
            for name, module in own.items():
                self._undo += [without_gradient(module, partial(self._prepare, phase)), guard_parts(module, name)]
                if not self.device.on_host:
                    self._undo.append(self._elastic.follow(phase, module))

    def _streamer(self, phase: PhasePlan, homes: Sequence[Home]) -> Streamer:
        spare_bytes = max(self.plan.budget.device_bytes - phase.device_bytes, 0)
        return Streamer(self.device, self._feeder, homes, phase.staging_bytes, spare_bytes)

    def _settle(self, unit: Unit, home: Tier, loading: Loading | None) -> Held:
        slab = lay_out(unit, loading)
        devices = tuple(weight.parameter.device for weight in unit.weights)
        try:
            self._held.append(self._mover.house(slab, home, devices))
            return self._held[-1]
        except BaseException:
            let_go(slab, devices)
            raise

    def _original(self, entry: Entry) -> torch.Tensor:
        return original(entry, self._reader, self._maps)

    def _packed_store(self) -> PackedStore:
        if self._store is None:
            self._store = PackedStore(self._store_folder, self._reader)
        return self._store

    # ---- phases

    def enter(self, component: str) -> None:
        """Have a component's phase on the device, for calls that do not go through a module's own call."""
        for phase in self._phases:
            if component in phase.plan.components:
                self._prepare(phase)

    def holds(self, module: nn.Module, attribute: str) -> bool:
        """Whether a parameter, given by its module and attribute, is one that the plan places."""
        return self._changes.holds(module, attribute) or self.experts.holds(module, attribute)

    def editing(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which the weights of a module may be changed in place. They are at home while it is open, and streamed as they are
        then from then on.

        Args:
            module: a component or a part of one. Weights whose home is on disk are held in RAM meanwhile: take one block at a time.

        Raises:
            Unsupported: on entering, where the component was cast while it is managed.
        """
        return self._changes.editing(module)

    def recast(self, component: str, dtype: torch.dtype) -> None:
        """Have a component that runs alone in its phase compute in another dtype from now on. Its first cast is kept for the next time.

        Raises:
            DoesNotFit: in that dtype it is over the budget; it stays as it was.
            Unsupported: it shares its phase, or its weights have no home outside the device.
        """
        phase = next((phase for phase in self._phases if phase.plan.components == (component,)), None)
        if phase is None:
            raise Unsupported(f"{component}: a cast to {dtype} while it shares the device with other components; load it in {dtype}")
        with self._switch, torch.inference_mode(False), torch.no_grad():
            self._turns.take(None)
            self._changes.look(phase)
            present = Cast(tuple(phase.residents), phase.streamer.homes)
            cast = phase.casts.get(dtype) or cast_phase(present, dtype, self.device, self._packed_store)
            check_room(cast, phase.plan, self.plan.budget.device_bytes, dtype)
            phase.casts[dtype] = cast
            self._deactivate()
            phase.residents = list(cast.residents)
            phase.streamer = Streamer(self.device, self._feeder, cast.streamed, cast.staging_bytes(phase.plan))
            for home in (*cast.residents, *cast.streamed):
                home.slab.install(home.parameters)
            phase.guests.cast(dtype)
            self._changes.renew()
            for owner, buffer in buffers_of(phase.modules):
                if buffer.is_floating_point() and buffer.dtype is not dtype:
                    self._undo.append(partial(owner.module._buffers.__setitem__, owner.attribute, buffer))
                    owner.module._buffers[owner.attribute] = buffer.to(dtype)

    def rearrange(self, plan: Plan) -> None:
        """Go on under another plan of the same network, with the same formats and budget. No call of a managed module may be under way.

        Raises:
            PlanMismatch: the plan differs by more than where blocks are, and how large the staging buffer is.
            Unsupported: a component was cast or has guests, or the engine is detached.
            torch.OutOfMemoryError, MemoryError, ReadFault, OverflowmlError: it could not be carried out; the engine goes on as before.
        """
        with self._switch, torch.inference_mode(False), torch.no_grad():
            check_same(self.plan, plan)
            for phase in self._phases:
                self._changes.look(phase)
            check_movable(self._phases)
            active, former = self._turns.present, self.plan
            if active is not None and not self._turns.is_alone(active):
                raise Unsupported(f"rearranging {active.plan.name} while another thread computes with it; let its call end first")
            try:
                self._go_under(plan)
                if active is not None:
                    self._activate(active, strictly=True)
            except BaseException:
                try:
                    self._go_under(former)
                except Exception as error:  # noqa: BLE001 -- the first one is raised; all blocks are whole, though not all where they were
                    _log.warning("not all weights could go back to where they were (%s); the model goes on as it is", error)
                if active is not None:
                    self._activate(active)
                raise

    def _go_under(self, plan: Plan) -> None:
        """Have all blocks where a plan has them; phases that change leave the device, the others are left alone."""
        try:
            for phase, wanted in zip(self._phases, plan.phases, strict=True):
                if (wanted.placements, wanted.staging_bytes) == (phase.plan.placements, phase.plan.staging_bytes):
                    phase.plan = wanted
                    continue
                if phase.stay is not Stay.AWAY:
                    phase.leave()
                take_down(phase, self._streamer(phase.plan, []))
                self._changes.renew()  # which refers to homes, too
                try:
                    self._mover.move(self._blocks, wanted, plan.budget.device_bytes)
                finally:
                    actual = as_held(wanted, self._blocks, len(plan.phases) > 1, plan.budget.device_bytes)
                    set_up(phase, actual, self._blocks, self._streamer, self._activate)
        finally:
            phases = tuple(phase.plan for phase in self._phases)
            self.plan = plan if phases == plan.phases else replace(plan, phases=phases, fingerprint="")
            self._changes.renew()

    def _shrink(self, phase: Phase, wanted: PhasePlan) -> None:
        self._go_under(replace(self.plan, phases=tuple(wanted if p is phase else p.plan for p in self._phases)))

    def _prepare(self, phase: Phase) -> None:
        self._changes.look(phase)
        if not phase.is_present:
            self._activate(phase)

    def _activate(self, phase: Phase, strictly: bool = False) -> None:
        """Make a phase the one on the device, ``strictly`` as it is planned. Whatever fails, no phase is half there."""
        with self._switch, torch.inference_mode(False), torch.no_grad():
            self._turns.take(phase)
            if phase.stay is Stay.THERE or self._detached:
                return  # given back while this call waited: it goes on with plain weights
            self._deactivate()
            self._changes.look(phase)
            phase.enter() if strictly else self._elastic.enter(phase)

    def _deactivate(self) -> None:
        for phase in self._phases:
            if phase.stay is not Stay.AWAY:
                phase.leave()

    def _forked(self) -> None:
        if not self._detached:
            self._switch = self._turns.forked()
            for phase in self._phases:
                phase.is_present = False
                phase.streamer.forked()

    def watched(self, component: str) -> tuple[Phase, nn.Module, dict[str, nn.Module]]:
        """A component's phase, its module, and its blocks by name, for whoever watches them run."""
        phase = next(phase for phase in self._phases if component in phase.plan.components)
        units = {block: held.slab.unit for (name, block), held in self._blocks.items() if name == component}
        blocks = {block: unit.module for block, unit in units.items() if unit.module is not None}
        return phase, phase.modules[phase.plan.components.index(component)], blocks

    # ---- report and end

    def summary(self) -> str:
        """The plan in words, for a terminal."""
        return self.plan.summary()

    def report(self) -> Estimate:
        """What was measured since the attachment: peak of the device's allocator, and per pass what was streamed and waited for."""
        streamers = [phase.streamer for phase in self._phases]
        passes = max((s.pass_count for s in streamers), default=0)
        on_disk = sum(h.slab.nbytes for h in self._held if h.home.tier is Tier.DISK)
        return Estimate(
            device_peak_bytes=self.device.peak_bytes(),
            pinned_bytes=self.device.pinned.peak_bytes,
            ram_bytes=self.device.pageable.peak_bytes,
            disk_bytes=on_disk,
            streamed_bytes=sum(s.streamed_bytes // max(s.pass_count, 1) for s in streamers),
            pass_s=self.measured_pass_s,
            stall_s=sum(s.stall_s for s in streamers) / max(passes, 1),
        )

    def expert_report(self) -> ExpertReport | None:
        """What was counted while experts ran apart from their blocks; None where the plan has none apart. After the end, as it was then."""
        return self.experts.report() or self._counted

    def detach(self) -> bool:
        """Give the modules back as they were, with plain weights, and free everything, once the calls of other threads are over.

        Returns:
            Whether this call did it: a second one does nothing, and goes on where the first was broken off.

        Raises:
            Unsupported: this thread is inside a call of the model, or the process was forked from that of the model.
        """
        with self._switch, torch.inference_mode(False), torch.no_grad():
            self._turns.refuse_inside()
            self._turns.take(None)
            if self._detached:
                return False
            self._counted = self.experts.report() or self._counted
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._changes.end()
            for phase in self._phases:
                unhook_blocks(phase)
            self._deactivate()
            self._blocks.clear()
            self.experts.give_back()
            while self._held:
                give_back(self._held[-1], self._original)
                self._held.pop()
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
            self._phases.clear()
            self._feeder.close()
            self._reader.close()
            if self._store is not None:
                self._store.close()
            self.device.trim()
            self._detached = True
            return True
