"""Plans beside one, each for the same limits: other blocks resident, less of a cache of experts, or no experts apart at all. Runs none."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overflowml_core.cli.tuning.watching import heaviest
from overflowml_core.errors import DoesNotFit, OverflowmlError
from overflowml_core.facts import Machine, Network, Tier
from overflowml_core.plan import PhasePlan, Plan

if TYPE_CHECKING:
    from overflowml_core.formats import Format
    from overflowml_core.planner.splits import Split

_CACHE_SHARE = 0.5
"""Of the cache, in a neighbour: what it gives back holds pages of the model's files, where the system keeps those."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Knows the plans beside one.

    Attributes:
        network: what they are for.
        machine: what they are on.
        formats: into which weights may be converted.
    """

    network: Network
    machine: Machine
    formats: tuple[Format, ...]

    def splits(self, plan: Plan) -> list[Plan]:
        """Plans with other residents and slots in the phase that holds most, the most promising first; those of unknown times last."""
        from overflowml_core.planner.rebuild import drafts_behind, setting_behind
        from overflowml_core.planner.splits import other_splits

        place = next(i for i, phase in enumerate(plan.phases) if heaviest(plan) in phase.components)
        setting = setting_behind(plan, self.network, self.machine)
        setting.budget = plan.budget
        draft, homes = drafts_behind(plan, self.network, self.formats)[place]
        splits = other_splits(draft, homes, setting, plan.takes_turns and len(plan.phases) > 1)
        splits.sort(key=lambda split: math.inf if split.total_s is None else split.total_s)
        return [self.with_phase(plan, _split_phase(plan.phases[place], split)) for split in splits]

    def with_phase(self, plan: Plan, phase: PhasePlan) -> Plan:
        """The plan with another phase in the place of the one of the same name.

        Raises:
            BadPlan: it does not hold together.
        """
        phases = tuple(phase if one.name == phase.name else one for one in plan.phases)
        strategy = plan.strategy
        if not any(one.expert_cache_bytes for one in phases):
            kind = "stream" if any(one.streamed for one in phases) else "phased"
            strategy = " ".join(filter(None, (kind, plan.strategy.partition(" ")[2])))
        return self._predicted(replace(plan, strategy=strategy, phases=phases, fingerprint="")).check()

    def of_experts(self, plan: Plan) -> list[Plan]:
        """Plans that are worth a try where experts are apart, the plan itself first."""
        found = [plan]
        try:
            phases = tuple(replace(phase, expert_cache_bytes=int(phase.expert_cache_bytes * _CACHE_SHARE)) for phase in plan.phases)
            found.append(self._predicted(replace(plan, phases=phases, fingerprint="")).check())
        except OverflowmlError:  # the cache would hold fewer experts than a token needs
            pass
        whole = self._with_whole_blocks(plan)
        return [*found, whole] if whole is not None else found

    def _with_whole_blocks(self, plan: Plan) -> Plan | None:
        """The plan that moves experts with their blocks; None where that does not fit."""
        from overflowml_core import session

        plugins, abilities = session.plugins(), session.abilities_of(False) - {"experts"}
        try:
            made = plugins.plan(self.network, self.machine, plan.workload, plan.limits, self.formats, abilities)
        except DoesNotFit:
            return None
        return None if made is None or not made.managed or plugins.objections(made, self.network, self.machine) else made

    def _predicted(self, plan: Plan) -> Plan:
        """The plan with what the cost model says of it."""
        from overflowml_core.planner.estimates import forecast, whole
        from overflowml_core.planner.expert_pace import expert_forecast
        from overflowml_core.planner.rebuild import drafts_behind, setting_behind

        setting = setting_behind(plan, self.network, self.machine)
        setting.budget = plan.budget
        turns = plan.takes_turns and len(plan.phases) > 1
        drafts = drafts_behind(plan, self.network, self.formats)
        parts = [(expert_forecast if draft.expert_cache_bytes else forecast)(draft, homes, setting, turns) for draft, homes in drafts]
        phases = tuple(replace(one, estimate=part.estimate, passes=part.passes) for one, part in zip(plan.phases, parts, strict=True))
        return replace(plan, phases=phases, estimate=whole([draft for draft, _ in drafts], parts, False), fingerprint="")


def _split_phase(phase: PhasePlan, split: Split) -> PhasePlan:
    residency = split.draft.residency
    placements = tuple(
        replace(block, tier=Tier.DEVICE if stays else home, home=home)
        for block, stays, home in zip(phase.placements, residency.resident, split.homes.blocks, strict=True)
    )
    return replace(phase, placements=placements, staging_bytes=residency.staging_bytes, slot_bytes=residency.slot_bytes)
