"""What an engine has for routed experts that are apart from their blocks: their homes, one conductor a phase, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from overflowml_core.expert_report import ExpertReport
from overflowml_core.expert_setting import ExpertSetting
from overflowml_core.facts import Tier
from overflowml_core.loading import Loading
from overflowml_core.plan import PhasePlan
from overflowml_core.runtime.device import Device
from overflowml_core.runtime.experts.apart import Apart
from overflowml_core.runtime.experts.bank_home import BankHome, bank_in_ram, bank_on_disk
from overflowml_core.runtime.experts.conductor import Conductor
from overflowml_core.runtime.experts.encoded import kernel_of
from overflowml_core.runtime.experts.encoded_home import encoded_in_ram, encoded_on_disk
from overflowml_core.runtime.experts.foresight import router_of
from overflowml_core.runtime.experts.listed import hook_experts
from overflowml_core.runtime.feeder import Feeder
from overflowml_core.runtime.homes import FileMaps
from overflowml_core.runtime.store import PackedStore
from overflowml_core.units import format_bytes

_log = logging.getLogger("overflowml")

Caller = Callable[..., torch.Tensor]
"""Computes what a module with stacked experts computes: called with the module, hidden states (tokens, hidden), numbers (tokens, k) of
experts and weights (tokens, k) of routing."""


class ExpertSide:
    """The experts of one engine."""

    def __init__(
        self, device: Device, feeder: Feeder, maps: FileMaps, open_store: Callable[[], PackedStore], setting: ExpertSetting
    ) -> None:
        """House none yet.

        Args:
            device: what computes.
            feeder: brings experts in.
            maps: the model's files in memory.
            open_store: opens the packed store, which is not asked for before it is needed.
            setting: how experts are run.
        """
        self._device = device
        self._feeder = feeder
        self._maps = maps
        self._open_store = open_store
        self._setting = setting
        self._conductors: list[Conductor] = []
        self.room_bytes: int | None = None
        """Of RAM, for weights that are read when experts are given back; None reads all."""

    def conduct(self, phase: PhasePlan, banks: Sequence[Apart], loading: Loading | None, done: Callable[[int], None]) -> Conductor | None:
        """Bring all banks of a phase to where the plan has them, and have them conducted.

        Args:
            phase: of the plan.
            banks: of all phases.
            loading: knows where weights without data are to be read.
            done: told the bytes of each bank when it is there.

        Returns:
            None where the phase has none.

        Raises:
            ReadFault, PlanMismatch, OverflowmlError: as for homes of blocks; what was housed is given back by :meth:`give_back`.
        """
        by_block = {(one.component, one.unit.name): one for one in banks}
        own = [by_block[p.component, p.block] for p in phase.placements if p.experts_home is not None]  # in order of execution
        if not own:
            return None
        made = Conductor(self._device, self._feeder, phase.expert_cache_bytes, self._setting)
        self._conductors.append(made)
        for one in own:
            made.seat(self._settle(one, loading), one.component, one.unit.name, one.per_token, router_of(one.unit.module, one.bank))
            done(one.bank.record_bytes * one.bank.count)
        self._say_how(own)
        return made

    def _say_how(self, banks: Sequence[Apart]) -> None:
        """Tell how experts in a format are computed with: not every device has kernels for them."""
        kind = self._device.torch_device.type
        told = {
            (one.bank.codec.format.name, matrix_dtype): kernel_of(one.bank.codec, kind, matrix_dtype)
            for one in banks
            if one.bank.codec is not None
            for matrix_dtype in one.bank.converted_dtypes
        }
        for (form, dtype), kernel in told.items():
            how = kernel.name if kernel is not None else "matrices that are decoded one at a time, for there is no kernel that takes them"
            _log.info("experts in %s of %s on %s are multiplied by %s", form, dtype, kind, how)

    def _settle(self, one: Apart, loading: Loading | None) -> BankHome:
        reader = self._feeder.reader
        if one.bank.codec is not None:
            if one.tier is Tier.DISK:
                return encoded_on_disk(one.bank, loading, reader, self._maps, self._open_store)
            return encoded_in_ram(one.bank, self._device, one.tier is Tier.PINNED, loading, reader, self._maps)
        if one.tier is Tier.DISK:
            return bank_on_disk(one.bank, self._device, loading, reader, self._maps, self._open_store)
        return bank_in_ram(one.bank, self._device, one.tier is Tier.PINNED, loading, reader)

    def hook_lists(self, conductor: Conductor, banks: Sequence[Apart], ensure: Callable[[], None]) -> list[Any]:
        """Hook the experts of a phase that are modules of their own.

        Args:
            conductor: of the phase.
            banks: of all phases.
            ensure: has the phase on the device.

        Returns:
            Handles; ``remove`` takes each one back.
        """
        blocks: Mapping[tuple[str, str], nn.Module | None] = {(one.component, one.unit.name): one.unit.module for one in banks}
        hooks: list[Any] = []
        for place, (seat, counts) in enumerate(zip(conductor.seats, conductor.counts.banks, strict=True)):
            block = blocks[counts.component, counts.block]
            if not seat.home.bank.is_stacked and block is not None:
                hooks += hook_experts(conductor, place, block, ensure)
        return hooks

    def callers(self) -> list[tuple[nn.Module, Caller]]:
        """The modules whose stacked experts are apart from them, each with what computes in its place. Hosts call it."""

        def caller(conductor: Conductor, place: int) -> Caller:
            return lambda module, hidden, index, weights, *_, **__: conductor.run(place, module, hidden, index, weights)

        return [
            (seat.home.bank.module, caller(conductor, place))
            for conductor in self._conductors
            for place, seat in enumerate(conductor.seats)
            if seat.home.bank.is_stacked
        ]

    def adds_by_expert(self, module: nn.Module, answer: bool) -> None:
        """Whether outputs of a module's experts are added up expert after expert, as the host did before, or token by token."""
        for seat in (seat for conductor in self._conductors for seat in conductor.seats if seat.home.bank.module is module):
            seat.adds_by_expert = answer

    def holds(self, module: nn.Module, attribute: str) -> bool:
        """Whether a parameter is one of an expert that is apart."""
        owners = (w.owners[0] for conductor in self._conductors for seat in conductor.seats for w in seat.home.bank.weights)
        return any(owner.module is module and owner.attribute == attribute for owner in owners)

    def report(self) -> ExpertReport | None:
        """What was counted; None where no experts are apart. Of several phases, the first that has some."""
        return next((conductor.report() for conductor in self._conductors), None)

    @property
    def unread_bytes(self) -> int:
        """What giving all experts back would read into RAM."""
        return sum(seat.home.unread_bytes for conductor in self._conductors for seat in conductor.seats)

    def give_back(self) -> None:
        """Let the modules hold plain weights again, as far as there is room for what is still unread. A second call does nothing."""
        left_bytes = 0
        while self._conductors:
            for seat in self._conductors[-1].seats:
                unread_bytes = seat.home.unread_bytes
                reads = self.room_bytes is None or unread_bytes <= self.room_bytes
                left_bytes += 0 if reads else unread_bytes
                if self.room_bytes is not None and reads:
                    self.room_bytes -= unread_bytes
                seat.home.give_back(reads)
            self._conductors.pop()
        if left_bytes:
            _log.warning(
                "%s of experts stay unread, for RAM has no room for them; load the model again to use it", format_bytes(left_bytes)
            )
