"""A plan at work on live modules: homes, phases, hooks, and the way back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import PlanMismatch, Unsupported
from overflowml_core.facts import Network, Tier
from overflowml_core.loading import Loading
from overflowml_core.plan import Estimate, PhasePlan, Placement, Plan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.feeder import LARGEST_WINDOW_BYTES, Feeder
from overflowml_core.runtime.gradients import refuse_gradients, without_gradient
from overflowml_core.runtime.guards import guard_parts
from overflowml_core.runtime.homes import FileMaps, Home, home_in_ram, home_on_device, home_on_disk
from overflowml_core.runtime.phase import Phase, buffers_of
from overflowml_core.runtime.recast import Cast, cast_phase, check_room
from overflowml_core.runtime.slab import Slab, lay_out
from overflowml_core.runtime.source import FileReader, stored_as_is
from overflowml_core.runtime.store import PackedStore
from overflowml_core.runtime.streamer import Streamer
from overflowml_core.runtime.structure import Structure, Unit, dissect

_log = logging.getLogger("overflowml")

Progress = Callable[[int, int], None]
"""Called with bytes brought in so far, and in all."""


@dataclass(slots=True)
class _Held:
    """A slab with its home and, where it never leaves the device, its arena; what detaching needs to know."""

    slab: Slab
    home: Home
    arena: torch.Tensor | None
    devices: tuple[torch.device, ...]


class Engine:
    """Runs modules by a plan until it is detached. See :class:`overflowml_core.protocols.Attachment`."""

    def __init__(self, plan: Plan, network: Network, device: Device, store_folder: Path) -> None:
        self.plan = plan
        self.network = network
        self.device = device
        self._store_folder = store_folder
        self._reader = FileReader()
        self._maps = FileMaps()
        self._store: PackedStore | None = None
        largest_slot = max((phase.slot_bytes for phase in plan.phases), default=0)
        self._feeder = Feeder(device, self._reader, min(largest_slot or LARGEST_WINDOW_BYTES, LARGEST_WINDOW_BYTES * 4))
        self._held: list[_Held] = []
        self._phases: list[Phase] = []
        self._hooks: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._active: Phase | None = None
        self._switch = threading.RLock()
        self._detached = False

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
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.device.reset_peak()
                self._build(modules, loading, progress)
                if self._phases:
                    self._activate(self._phases[0])
        except BaseException:
            self.detach()
            raise
        return self

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have something of a host's undone when the engine is detached; the latest first."""
        self._undo.append(undo)

    def _build(self, modules: Mapping[str, nn.Module], loading: Loading | None, progress: Progress | None) -> None:
        structures = {name: dissect(module) for name, module in modules.items()}
        total = sum(unit.slab_bytes for s in structures.values() for unit in s.units)
        done = 0
        for phase_plan in self.plan.phases:
            placements = _match(phase_plan, structures)
            streamed: list[Home] = []
            residents: list[Home] = []
            for unit, tier, home_tier in placements:
                held = self._settle(unit, home_tier, loading)
                if tier is not Tier.DEVICE:
                    streamed.append(held.home)
                elif held.arena is None:
                    residents.append(held.home)
                done += held.slab.nbytes
                if progress is not None:
                    progress(done, total)
            streamer = Streamer(self.device, self._feeder, streamed, phase_plan.slot_count, phase_plan.slot_bytes)
            phase = Phase(self.device, self._feeder, phase_plan, streamer, residents, [modules[name] for name in phase_plan.components])
            self._phases.append(phase)
            self._hook_phase(phase, {name: modules[name] for name in phase_plan.components}, structures)

    def _settle(self, unit: Unit, home: Tier, loading: Loading | None) -> _Held:
        slab = lay_out(unit, loading)
        devices = tuple(weight.parameter.device for weight in unit.weights)
        arena: torch.Tensor | None = None
        if home is Tier.DEVICE:
            arena = self.device.empty(slab.nbytes)
            self._feeder.load(slab, arena)
            parameters = slab.parameters(arena)
            settled = home_on_device(slab, arena, self._maps)
            slab.install(parameters)
        elif home is Tier.DISK:
            settled = home_on_disk(slab, self._reader, self._maps, self._packed_store)
        else:
            settled = home_in_ram(slab, self.device, home is Tier.PINNED, self._reader)
        if home is not Tier.DEVICE:
            slab.install(settled.parameters)
        held = _Held(slab, settled, arena, devices)
        self._held.append(held)
        return held

    def _packed_store(self) -> PackedStore:
        if self._store is None:
            self._store = PackedStore(self._store_folder)
            self._store.open_in(self._reader)
        return self._store

    # ---- phases

    def enter(self, component: str) -> None:
        """Have a component's phase on the device, for calls that do not go through a module's own call."""
        for phase in self._phases:
            if component in phase.plan.components and self._active is not phase:
                self._activate(phase)

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
            present = Cast(tuple(phase.residents), phase.streamer.homes)
            cast = phase.casts.get(dtype) or cast_phase(present, dtype, self.device, self._packed_store)
            check_room(cast, phase.plan, self.plan.budget.device_bytes, dtype)
            phase.casts[dtype] = cast
            if self._active is phase:
                self._deactivate()
            phase.residents = list(cast.residents)
            phase.streamer = Streamer(self.device, self._feeder, cast.streamed, phase.plan.slot_count, cast.slot_bytes)
            for home in (*cast.residents, *cast.streamed):
                home.slab.install(home.parameters)
            for owner, buffer in buffers_of(phase.modules):
                if buffer.is_floating_point() and buffer.dtype is not dtype:
                    self._undo.append(partial(owner.module._buffers.__setitem__, owner.attribute, buffer))
                    owner.module._buffers[owner.attribute] = buffer.to(dtype)

    def _activate(self, phase: Phase) -> None:
        """Make a phase the one on the device. Whatever fails, no phase is half there."""
        with self._switch, torch.inference_mode(False), torch.no_grad():
            if self._active is phase:
                return
            self._deactivate()
            phase.enter()
            self._active = phase

    def _deactivate(self) -> None:
        phase, self._active = self._active, None
        if phase is not None:
            phase.leave()

    # ---- hooks

    def _hook_phase(self, phase: Phase, modules: Mapping[str, nn.Module], structures: Mapping[str, Structure]) -> None:
        taking_turns = len(self.plan.phases) > 1

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active is not phase:
                self._activate(phase)
            phase.streamer.begin_pass()
            refuse_gradients(module, args, kwargs)

        def ensure(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._active is not phase:
                self._activate(phase)

        for k, home in enumerate(phase.streamer.homes):
            if home.slab.unit.module is not None:
                self._hook_block(phase, k, home.slab.unit.module)
        for name, module in modules.items():
            self._hooks.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            self._undo.append(without_gradient(module))
            self._undo.append(guard_parts(module, name))
            if taking_turns:
                # Pipelines also call parts of a component by themselves (vae.decode, text_model.final_layer_norm).
                for part in _direct_owners(structures[name]):
                    if part is not module:
                        self._hooks.append(part.register_forward_pre_hook(ensure, prepend=True))

    def _hook_block(self, phase: Phase, k: int, module: nn.Module) -> None:
        # Through the phase, which has another streamer after a cast.

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active is not phase:
                self._activate(phase)
            refuse_gradients(module, args, kwargs)
            phase.streamer.wait(k)

        def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            phase.streamer.release(k)

        self._hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, always_call=True))

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
            stall_s=sum(s.stall_s for s in streamers) / max(passes, 1),
        )

    def detach(self) -> None:
        """Give the modules back as they were, with plain weights, and free everything. A second call does nothing."""
        with self._switch, torch.inference_mode(False), torch.no_grad():
            if self._detached:
                return
            self._detached = True
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._deactivate()
            while self._held:
                self._restore(self._held.pop())
            while self._undo:
                self._undo.pop()()
            self._phases.clear()
            self._feeder.close()
            self._reader.close()
            if self._store is not None:
                self._store.close()
            self.device.trim()

    def _restore(self, held: _Held) -> None:
        parameters = []
        for entry, parameter, device in zip(held.slab.entries, held.home.parameters, held.devices, strict=True):
            # Only what is mapped from the model's own file may stay as it is; pinned memory and the packed store go away.
            if held.home.host is not None or not stored_as_is(held.slab):
                values = entry.view(held.arena) if held.arena is not None else parameter.data
                parameter.data = values.detach().to("cpu" if device.type == "meta" else device, copy=True)
            parameters.append(parameter)
        held.slab.install(tuple(parameters))


def _match(phase: PhasePlan, structures: Mapping[str, Structure]) -> list[tuple[Unit, Tier, Tier]]:
    """The units of a phase, each with its tier and home, after checking that the plan speaks of these modules."""
    matched: list[tuple[Unit, Tier, Tier]] = []
    blocks: dict[tuple[str, str], Unit] = {}
    for name in phase.components:
        if name not in structures:
            raise PlanMismatch(f"the plan places component {name!r}, which this model does not have; make a plan for this model")
        matched.append((structures[name].fixed, Tier.DEVICE, phase.fixed_home))
        blocks.update(((name, unit.name), unit) for unit in structures[name].blocks)
    for placement in phase.placements:
        unit = blocks.pop((placement.component, placement.block), None)
        if unit is None or unit.slab_bytes != placement.stored_bytes:
            raise PlanMismatch(_mismatch(placement, unit))
        matched.append((unit, placement.tier, placement.home))
    if blocks:
        component, block = next(iter(blocks))
        raise PlanMismatch(f"{component}.{block}: the plan does not place this block; make a plan for this model")
    return matched


def _mismatch(placement: Placement, unit: Unit | None) -> str:
    found = "no such block" if unit is None else f"a block of {unit.slab_bytes} bytes"
    wanted = f"{placement.component}.{placement.block}: the plan has {placement.stored_bytes} bytes"
    return f"{wanted}, the model {found}; make a plan for this model"


def _direct_owners(structure: Structure) -> Iterable[nn.Module]:
    """Modules that are called and must find their phase on the device: owners of fixed weights and buffers, and all blocks."""
    owners: dict[int, nn.Module] = {}
    for weight in structure.fixed.weights:
        owners.update((id(owner.module), owner.module) for owner in weight.owners)
    owners.update((id(module), module) for _, module, _ in structure.buffers)
    owners.update((id(unit.module), unit.module) for unit in structure.blocks if unit.module is not None)
    return owners.values()
