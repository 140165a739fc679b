"""Candidates: ways to run a network, each worked out and held against the limits. Compares none with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Tier
from overflowml_core.plan import Estimate
from overflowml_core.planner import homes as homes_of
from overflowml_core.planner import reasons
from overflowml_core.planner.estimates import PhaseForecast, forecast, whole
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.memory import pinned_budget
from overflowml_core.planner.needs import PhaseNeed, Recipe, in_variant, phase_needs, together_bytes
from overflowml_core.planner.residency import Residency, choose
from overflowml_core.planner.setting import Setting, key_of
from overflowml_core.planner.stage import move_of
from overflowml_core.planner.timed import Problem, choose_timed
from overflowml_core.staging import fitting

QUALITY_ORDER = ("lossless", "minimal", "any")

MISSING = "missing formats"
"""The ability to plan with formats into which nothing converts weights on this machine, as forecasts do."""

EXPERT_FORMATS = "formats of experts"
"""The ability to convert blocks whose experts are kept apart from them, as forecasts do."""


@dataclass(slots=True)
class Candidate:
    """One way to run a network.

    Attributes:
        kind: its strategy without the format.
        recipe: what is done to weights.
        setting: what it was worked out for; another device's where it does not run on the first.
        drafts: its phases; empty where it does not fit.
        homes: where their weights wait.
        forecasts: what its phases take.
        estimate: what it takes in all.
        reason: why it does not run within the limits; empty where it does.
        failure: the same as an error, with what would help.
        requires: abilities that carry it out.
        devices: names of the devices, where there are several.
        each_bytes: their budgets.
    """

    kind: str
    recipe: Recipe
    setting: Setting
    drafts: tuple[Draft, ...] = ()
    homes: tuple[PhaseHomes, ...] = ()
    forecasts: tuple[PhaseForecast, ...] = ()
    estimate: Estimate | None = None
    reason: str = ""
    failure: DoesNotFit | None = None
    requires: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ()
    each_bytes: tuple[int, ...] = ()

    @property
    def strategy(self) -> str:
        """Its name: the kind, and the format behind it."""
        return f"{self.kind} {self.recipe.name}".rstrip()

    @property
    def viable(self) -> bool:
        """Whether it runs within the limits."""
        return not self.reason

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that it switches on."""
        return tuple(draft.need.variant for draft in self.drafts if draft.need.variant)

    @property
    def quality(self) -> str:
        """What it does to the result."""
        tiled = any(not draft.need.lossless for draft in self.drafts)
        return max(self.recipe.loss, "minimal" if tiled else "lossless", key=QUALITY_ORDER.index)

    @property
    def takes_turns(self) -> bool:
        """Whether the phases are on the device one after the other."""
        return self.kind not in ("direct", "cpu") and len(self.drafts) > 1

    @property
    def score_s(self) -> float | None:
        """Seconds to compare by: all that it takes, or at least takes; None where nothing is known of what it computes."""
        parts = [part.floor_s for part in self.forecasts]
        if not any(part.estimate.total_s is not None for part in self.forecasts) or None in parts:
            return None
        return sum(part for part in parts if part is not None)

    @property
    def moved_bytes(self) -> int:
        """Bytes that come to the device for a unit of work, where no time is known to compare by."""
        total = 0
        for draft, phase in zip(self.drafts, self.homes, strict=True):
            for size, stays, home in zip(draft.need.sizes_bytes, draft.residency.resident, phase.blocks, strict=True):
                total += size * (draft.need.passes if not stays else home is not Tier.DEVICE)
        for draft, part in zip(self.drafts, self.forecasts, strict=False):
            total += draft.need.passes * part.estimate.streamed_bytes if draft.expert_cache_bytes else 0
        return total


def requirements(recipe: Recipe) -> frozenset[str]:
    """Abilities that converting weights takes."""
    if recipe.format is None:
        return frozenset()
    return frozenset({"formats", MISSING}) if recipe.format.missing else frozenset({"formats"})


def whole_residency(need: PhaseNeed) -> Residency:
    """Everything stays."""
    return Residency((True,) * len(need.blocks), 0, 0)


def settled(candidate: Candidate, homes: Sequence[PhaseHomes]) -> bool:
    """Give a candidate's weights these homes. False where that needs a disk that may not be used: the candidate is not viable then."""
    setting = candidate.setting
    candidate.homes = tuple(homes)
    if setting.limits.allow_disk:
        return True
    refused = reasons.disk_refusal(candidate.drafts, candidate.homes, setting.machine, setting.budget)
    if refused is None:
        return True
    candidate.reason, candidate.failure = str(refused), refused
    return False


def worked_out(candidate: Candidate) -> Candidate:
    """Give a candidate's weights their homes and predict what it takes; it is not viable afterwards where its limits do not hold it."""
    setting, drafts = candidate.setting, candidate.drafts
    if candidate.kind in ("direct", "cpu"):
        candidate.homes = tuple(PhaseHomes([Tier.DEVICE] * len(draft.need.blocks)) for draft in drafts)
    else:
        assigned = homes_of.assign(drafts, pinned_budget(setting.machine, setting.budget), setting.budget.host_bytes)
        if not settled(candidate, assigned):
            return candidate
    turns = candidate.takes_turns
    candidate.forecasts = tuple(forecast(d, h, setting, turns) for d, h in zip(drafts, candidate.homes, strict=True))
    candidate.estimate = whole(drafts, candidate.forecasts, candidate.kind in ("direct", "cpu"))
    return candidate


def plain_candidates(setting: Setting, recipe: Recipe, variants: bool) -> list[Candidate]:
    """Residency and streaming on one device: direct, phased, stream, and with as few residents as can be.

    What is not needed, for a simpler way with the same weights fits, is not worked out and not among them.

    Args:
        setting: the request.
        recipe: what is done to weights.
        variants: components may run in a variant.
    """
    budget_bytes = setting.budget.device_bytes
    needs = phase_needs(setting.network, setting.limits, recipe)
    if variants:
        needs = tuple(in_variant(need, budget_bytes, setting.limits) for need in needs)
    found = [_direct(setting, recipe, needs)]
    if not found[0].viable or setting.limits.excluded & {("strategy", "direct"), ("strategy", found[0].strategy)}:
        if len(needs) > 1:
            found.append(_phased(setting, recipe, needs))
        found.append(_stream(setting, recipe, needs))
    found.append(_sequential(setting, recipe, needs))
    formats = requirements(recipe)
    for candidate in found:
        candidate.requires |= formats | ({"variants"} if candidate.variants else frozenset())
    return [c for c in found if c.estimate is not None or c.reason]


def _direct(setting: Setting, recipe: Recipe, needs: Sequence[PhaseNeed]) -> Candidate:
    candidate = Candidate("direct", recipe, setting)
    together = together_bytes(needs)
    if together > setting.budget.device_bytes:
        candidate.reason = f"needs {reasons.of(together, setting.budget.device_bytes)}"
        candidate.estimate = Estimate(device_peak_bytes=together)
        return candidate
    candidate.drafts = tuple(Draft(need, whole_residency(need)) for need in needs)
    return worked_out(candidate)


def _phased(setting: Setting, recipe: Recipe, needs: Sequence[PhaseNeed]) -> Candidate:
    candidate = Candidate("phased", recipe, setting)
    largest = max(needs, key=lambda need: need.whole_bytes)
    if largest.whole_bytes > setting.budget.device_bytes:
        candidate.reason = f"{largest.name} alone needs {reasons.of(largest.whole_bytes, setting.budget.device_bytes)}"
        candidate.estimate = Estimate(device_peak_bytes=largest.whole_bytes)
        return candidate
    candidate.drafts = tuple(Draft(need, whole_residency(need)) for need in needs)
    return worked_out(candidate)


def _stream(setting: Setting, recipe: Recipe, needs: Sequence[PhaseNeed]) -> Candidate:
    candidate = Candidate("stream", recipe, setting)
    turns = len(needs) > 1
    choices = [_chosen(setting, need, turns) for need in needs]
    kept = [choice for choice in choices if choice is not None]
    if len(kept) < len(choices):
        candidate.failure = reasons.device_shortfall(needs, setting.machine, setting.limits, setting.budget.device_bytes)
        candidate.reason = str(candidate.failure)
        return candidate
    if all(choice.slot_count == 0 for choice in kept):
        return candidate  # nothing is streamed: phased is the same
    candidate.drafts = tuple(Draft(need, choice) for need, choice in zip(needs, kept, strict=True))
    worked_out(candidate)
    if not candidate.viable or any(setting.rounds(need) is None for need in needs):
        return candidate
    # The choice by time takes pinned copies for granted. Where they are not all pinned, the fewest bytes may be the better choice.
    if not setting.in_ram and any(tier in (Tier.RAM, Tier.DISK) for phase in candidate.homes for tier in phase.blocks):
        most = [choose(need.sizes_bytes, need.owners, _room(setting, need)) for need in needs]
        drafts = tuple(Draft(need, choice) for need, choice in zip(needs, most, strict=True) if choice is not None)
        other = worked_out(replace(candidate, drafts=drafts))
        if other.viable and other.score_s is not None and candidate.score_s is not None and other.score_s < candidate.score_s:
            return other
    return candidate


def _sequential(setting: Setting, recipe: Recipe, needs: Sequence[PhaseNeed]) -> Candidate:
    """Every block streamed, through two slots where they fit: what takes the least of the device. A single block stays, as in its slot."""
    candidate = Candidate("sequential", recipe, setting)
    drafts = []
    for need in needs:
        whole_blocks = [size for size in need.sizes_bytes if size]
        slot_bytes = max(whole_blocks, default=0)
        if need.smallest_bytes > setting.budget.device_bytes:
            return candidate
        if len(whole_blocks) < 2:
            drafts.append(Draft(need, whole_residency(need)))
            continue
        slot_count = min(2, len(whole_blocks) - 1)
        if need.smallest_bytes + (slot_count - 1) * slot_bytes > setting.budget.device_bytes:
            slot_count = 1
        staging_bytes = fitting(whole_blocks, min(slot_count * slot_bytes, sum(whole_blocks) - 1))  # all of them would be residency
        drafts.append(Draft(need, Residency((False,) * len(need.blocks), staging_bytes, slot_bytes)))
    if not any(draft.residency.slot_count for draft in drafts):
        return candidate
    candidate.drafts = tuple(drafts)
    return worked_out(candidate)


def _room(setting: Setting, need: PhaseNeed) -> int:
    return setting.budget.device_bytes - need.fixed_bytes - need.activation_bytes


def _chosen(setting: Setting, need: PhaseNeed, takes_turns: bool) -> Residency | None:
    key = key_of(need)
    if key not in setting.known_choices:
        setting.known_choices[key] = chosen_residency(setting, need, takes_turns)
    return setting.known_choices[key]


def chosen_residency(setting: Setting, need: PhaseNeed, takes_turns: bool) -> Residency | None:
    """The residents of a phase: by time where it is known what the phase computes and how fast, else the most bytes. Rates that are
    assumed are good enough to tell a user what to expect, and not to leave memory unused.

    Returns:
        None where not even one slot for the largest block fits.
    """
    rounds = setting.rounds(need)
    tier = Tier.DISK if setting.in_ram else Tier.PINNED
    most = choose(need.sizes_bytes, need.owners, _room(setting, need))
    if most is None or not rounds or setting.rates.source == "assumed" or (most.slot_count == 0 and not takes_turns):
        return most
    known = {size: move_of(size, tier, setting.rates, size, setting.in_ram) for size in {*need.sizes_bytes, need.fixed_bytes}}
    moves = {size: move for size, move in known.items() if move is not None}
    if len(moves) < len(known):
        return most
    bring_s = {size: max(move.link_s, move.disk_s) if takes_turns else 0.0 for size, move in moves.items()}
    problem = Problem(
        sizes_bytes=need.sizes_bytes,
        owners=need.owners,
        room_bytes=_room(setting, need),
        rounds=rounds,
        moves=[moves[size] for size in need.sizes_bytes],
        bring_s=[bring_s[size] for size in need.sizes_bytes],
        fixed_s=bring_s[need.fixed_bytes],
        takes_turns=takes_turns,
        in_ram=setting.in_ram,
    )
    return choose_timed(problem) or most
