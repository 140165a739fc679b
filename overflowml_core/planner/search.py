"""Decides on a plan: works candidates out, has them judged, and writes the winner down. Pure: same arguments, same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from overflowml_core.errors import DoesNotFit, NearMiss
from overflowml_core.facts import Limits, Machine, Network, Tier, Workload
from overflowml_core.formats import Format
from overflowml_core.plan import Budget, PhasePlan, Placement, Plan, Rejected
from overflowml_core.planner import judge, leaves, reasons, sentences
from overflowml_core.planner.candidates import Candidate, plain_candidates
from overflowml_core.planner.conversion import weigh, weigh_apart
from overflowml_core.planner.devices import cpu_candidate, split_candidate
from overflowml_core.planner.estimates import PhaseForecast
from overflowml_core.planner.experts import expert_candidate
from overflowml_core.planner.homes import Draft, PhaseHomes
from overflowml_core.planner.needs import AS_IS, Recipe, phase_needs, together_bytes
from overflowml_core.planner.setting import Setting, setting_of


def make_plan(
    network: Network,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    formats: tuple[Format, ...] = (),
    abilities: frozenset[str] = frozenset(),
) -> Plan:
    """Decide which weights stay on the device and which are streamed to it, from where, and in which format.

    Args:
        network: what runs, with exact sizes.
        machine: what it runs on.
        workload: what it will be asked to do; its bytes and operations are already in the network's profiles.
        limits: what the user grants.
        formats: what weights may be converted into.
        abilities: what can be carried out beyond residency and streaming: "formats", "experts", "devices", "variants". A candidate that
            needs more is named among the rejected, with what it would take, and never chosen.

    Returns:
        A plan that has passed its own check.

    Raises:
        DoesNotFit: no plan respects the limits; the message says how much is missing, where, and what would help.
    """
    setting = setting_of(network, machine, workload, limits, tuple(formats), frozenset(abilities))
    candidates = _candidates(setting)
    for candidate in candidates:
        judge.exclude(candidate, limits)
    candidates = judge.one_of_each(candidates, setting.abilities)
    chosen = judge.best_of(candidates, limits, setting.abilities)
    if chosen is not None:
        return _written_down(chosen, candidates, setting).check()
    apart = leaves.finer(network, setting.limits, setting.budget.device_bytes)
    if apart is None:
        raise _failure(candidates, setting)
    try:
        plan = make_plan(apart, machine, workload, limits, formats, abilities)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error} ({leaves.largest_leaf(apart, network)})", error.near_misses) from None
    return replace(plan, reasons=(*plan.reasons, leaves.sentence(apart, network)))


def smallest_budget_bytes(network: Network, machine: Machine, limits: Limits) -> int:
    """The smallest device budget in bytes with which :func:`make_plan` finds a plan that changes no weight and switches on no variant.

    Every phase must hold its weights outside blocks, one slot for its largest block, or for the largest of the modules inside it, and its
    activations. Where the only place outside the compute tier is a disk that may not be used, everything has to stay. Whether RAM beside
    an accelerator holds what waits there is not asked: with ``allow_disk`` it always has somewhere to go.
    """
    needs = phase_needs(network, limits)
    if machine.compute.unified and not limits.allow_disk:
        return together_bytes(needs)
    return leaves.least_budget_bytes(network, limits)


def _recipes(setting: Setting) -> list[Recipe]:
    """Weights as stored, then every format: for all components, and for those of the heaviest phase alone."""
    phases = setting.network.phases()
    _, heaviest = max(phases, key=lambda phase: sum(c.weight_bytes for c in phase[1]), default=("", ()))
    found = [AS_IS]
    for one in setting.formats:
        smaller = frozenset(
            c.name for c in setting.network.components if any(weigh(b, one).format or weigh_apart(b, one).format for b in c.blocks)
        )
        scopes = dict.fromkeys((smaller, smaller & frozenset(c.name for c in heaviest)))
        found += [Recipe(one, scope) for scope in scopes if scope]
    return found


def _candidates(setting: Setting) -> list[Candidate]:
    """All candidates, the simplest first; of those in a format only what may be chosen or compared with."""
    found: list[Candidate] = []
    for recipe in _recipes(setting):
        ways = plain_candidates(setting, recipe, variants=True)
        if "variants" not in setting.abilities and any(way.variants for way in ways):
            ways = plain_candidates(setting, recipe, variants=False) + [way for way in ways if way.viable and way.variants]
        beyond = (expert_candidate(setting, recipe), split_candidate(setting, recipe))
        found += [way for way in ways if recipe is AS_IS or way.kind != "sequential"]
        found += [way for way in beyond if way is not None]
    cpu = cpu_candidate(setting)
    return found if cpu is None else [*found, cpu]


def _failure(candidates: Sequence[Candidate], setting: Setting) -> DoesNotFit:
    """The error of the candidate that needs least of those that failed and might be used, the plainest of equals, and as near misses those
    that fit and may not be used."""
    barred = [c for c in candidates if c.viable]
    remedies = {c.strategy: _remedy(c, setting) for c in barred}
    misses = tuple(
        NearMiss(c.strategy, c.estimate.device_peak_bytes, c.setting.budget.device_bytes, remedies[c.strategy])
        for c in barred
        if c.estimate is not None and not judge.permitted(c, setting.limits) and judge.carried_out(c, setting.abilities)
    )
    lossy = f", or permit {misses[0].strategy} with {misses[0].remedy}" if misses else ""
    able = [c for c in candidates if judge.permitted(c, setting.limits) and judge.carried_out(c, setting.abilities)]
    for kind in ("stream", "phased", "direct"):
        failures = [c.failure for c in able if c.kind == kind and c.failure is not None]
        if failures:
            failure = min(failures, key=lambda one: one.near_misses[0].needed_bytes if one.near_misses else 0)
            return DoesNotFit(f"{failure}{lossy}", (*failure.near_misses, *misses))
    excluded = [c for c in candidates if c.reason.startswith("excluded")]
    if excluded:
        return DoesNotFit(
            f"everything that fits is excluded ({excluded[0].strategy}: {excluded[0].reason}); permit it or grant more", misses
        )
    needs = phase_needs(setting.network, setting.limits)
    shortfall = reasons.device_shortfall(needs, setting.machine, setting.limits, setting.budget.device_bytes)
    return DoesNotFit(f"{shortfall}{lossy}", (*shortfall.near_misses, *misses))


def _remedy(candidate: Candidate, setting: Setting) -> str:
    if not judge.permitted(candidate, setting.limits):
        return f"quality='{candidate.quality}'"
    return f"a version that carries out {', '.join(sorted(candidate.requires - setting.abilities))}"


def _written_down(chosen: Candidate, candidates: Sequence[Candidate], setting: Setting) -> Plan:
    own = chosen.setting
    budget = own.budget
    if chosen.each_bytes:
        budget = Budget(sum(chosen.each_bytes), budget.host_bytes, budget.disk_bytes, chosen.each_bytes)
    phases = tuple(_phase_plan(d, h, f) for d, h, f in zip(chosen.drafts, chosen.homes, chosen.forecasts, strict=True))
    assert chosen.estimate is not None  # whoever is viable has one
    return Plan(
        strategy=chosen.strategy,
        network=setting.network.class_name,
        network_fingerprint=setting.network.fingerprint,
        weight_bytes=setting.network.weight_bytes,
        device=own.machine.compute.torch_name,
        device_name=own.machine.compute.name,
        workload=setting.workload,
        limits=setting.limits,
        budget=budget,
        phases=phases,
        estimate=chosen.estimate,
        rejected=_rejected(chosen, candidates, setting),
        reasons=sentences.sentences(chosen, phases),
        quality=chosen.quality,
        devices=chosen.devices,
        rates=replace(own.rates, op_seconds=()),
    )


def _rejected(chosen: Candidate, candidates: Sequence[Candidate], setting: Setting) -> tuple[Rejected, ...]:
    told = judge.rejections(candidates, chosen, setting.limits, setting.abilities)
    named = {r.strategy for r in told} | {chosen.strategy}
    as_stored = [c.kind for c in candidates if c.recipe is AS_IS and c.viable and c.kind in reasons.STRATEGIES]
    simplest = as_stored[0] if as_stored else ""
    needs = phase_needs(setting.network, setting.limits)
    plain = [r for r in reasons.rejected(simplest, needs, setting.budget.device_bytes) if r.strategy not in named]
    order = {strategy: place for place, strategy in enumerate(reasons.STRATEGIES)}
    first = sorted([r for r in (*told, *plain) if r.strategy in order], key=lambda r: order[r.strategy])
    return (*first, *(r for r in told if r.strategy not in order))


def _phase_plan(draft: Draft, homes: PhaseHomes, forecast: PhaseForecast) -> PhasePlan:
    need, residency = draft.need, draft.residency
    count = len(need.blocks)
    devices = draft.devices or (0,) * count
    experts = homes.experts or [None] * count
    placements = tuple(
        Placement(component, block.name, Tier.DEVICE if stays else home, home, size, weight.format, device, bank)
        for (component, block), size, stays, home, weight, device, bank in zip(
            need.blocks, need.sizes_bytes, residency.resident, homes.blocks, need.weights, devices, experts, strict=True
        )
    )
    return PhasePlan(
        name=need.name,
        components=tuple(component.name for component in need.components),
        fixed_bytes=need.fixed_bytes,
        fixed_home=homes.fixed,
        staging_bytes=residency.staging_bytes,
        slot_bytes=residency.slot_bytes,
        activation_bytes=need.activation_bytes,
        placements=placements,
        estimate=forecast.estimate,
        variant=need.variant,
        expert_cache_bytes=draft.expert_cache_bytes,
        passes=forecast.passes,
    )
