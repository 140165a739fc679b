"""Each trap of plans: a plan that steps into it, one that does not, one that steered around it, and one where it was never in the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from overflowml_core.facts import Experts, Limits, Linear, Machine, Network, Tier, Variant
from overflowml_core.plan import Avoided, Plan
from overflowml_core.traps import CATALOG, Objection, avoided, objections, trap_named
from tests.traps.build import GIB, MIB, block_changes, component, machine, network, on, phase, plan, with_accelerator

Case = tuple[Plan, Network, Machine]


@dataclass(frozen=True)
class Cases:
    """What a trap must say yes and no to. ``excludes`` is what its objection must name."""

    steps: Callable[[], Case] | None = None
    spared: Callable[[], Case] | None = None
    excludes: tuple[tuple[str, str], ...] = ()
    relevant: Callable[[], Case] | None = None
    needle: str = ""
    irrelevant: Callable[[], Case] | None = None


def _streamed(*parts, budget=16 * GIB, where=None, resident=2, home=Tier.PINNED, **changes) -> Case:
    where = where or machine()
    net = network(*parts)
    return plan(net, *(phase(p, resident=resident, home=home) for p in parts), budget=budget, on=where, **changes), net, where


def _whole(*parts, budget=16 * GIB, where=None, strategy="phased", **changes) -> Case:
    where = where or machine()
    net = network(*parts)
    return plan(net, *(phase(p) for p in parts), budget=budget, strategy=strategy, on=where, **changes), net, where


def _big():
    return component("transformer", [GIB] * 22, 100 * MIB, 468 * MIB)


def _small():
    return component("text_encoder", [GIB] * 4, 100 * MIB, 8 * MIB)


def _phase_changed(case: Case, **changes) -> Case:
    made, net, where = case
    return replace(made, phases=(replace(made.phases[0], **changes), *made.phases[1:])), net, where


def _formatted(name, where=None, part=None, **options) -> Case:
    part, where = part or _small(), where or machine()
    net = network(part)
    return plan(net, phase(part, format=name, **options), budget=16 * GIB, on=where), net, where


def _kept():
    return block_changes(_small(), 1, keep_format=True)


def _moe(**bank):
    experts = Experts(**{"count": 64, "nbytes": 15 * MIB, "per_token": 4, **bank})
    part = component("model", [GIB] * 4, 100 * MIB, 8 * MIB)
    return replace(part, blocks=tuple(replace(b, experts=experts, linear_count=b.weight_count // 20) for b in part.blocks))


def _vae(lossless=False, activations=12 * GIB, **changes):
    part = component("vae", [], 160 * MIB, activations, class_name="AutoencoderKL")
    return replace(part, variants=(Variant("tiling", lossless, ()),), **changes)


def _tiled(part=None, budget=8 * GIB, quality="minimal", variant="tiling", where=None) -> Case:
    part, where = part or _vae(), where or machine()
    net = network(_small(), part)
    phases = (phase(_small()), phase(part, variant=variant, activation_bytes=GIB))
    return plan(net, *phases, budget=budget, strategy="phased", on=where, limits=Limits(quality=quality)), net, where


def _unet():
    return component("unet", [GIB] * 8, 100 * MIB, 400 * MIB, class_name="UNet2DConditionModel")


def _sliced(part, resident, where=None) -> Case:
    where = where or machine()
    net = network(part)
    return plan(net, phase(part, resident=resident, variant="attention-slicing"), budget=16 * GIB, on=where), net, where


def _mps(**changes) -> Machine:
    return with_accelerator(machine(unified=True), **changes)


def _outside(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, tier) for tier in ("pinned", "ram"))


def test_experts_that_wait_apart_are_what_a_format_is_of():
    made, net, where = _formatted("int8", part=_moe())
    (first,) = made.phases
    apart = tuple(replace(p, experts_home=Tier.DISK) for p in first.placements)
    moved = replace(made, phases=(replace(first, placements=apart),), fingerprint="")
    known = replace(net, components=(_moe(matrices=(Linear(1024, 1024, "BF16"),)),))
    trap = trap_named("stacked-experts-unconverted")
    assert trap is not None
    assert trap.objection(moved, net, where) is not None
    assert trap.objection(moved, known, where) is None
    assert trap.objection(made, known, where) is not None


def test_experts_in_fp8_that_wait_outside_move_on_windows():
    where = replace(machine(), environment=frozenset({"windows"}))
    made, net, _ = _formatted("fp8", part=_moe(), where=where)
    (first,) = made.phases
    apart = tuple(replace(p, tier=Tier.DEVICE, home=Tier.DEVICE, experts_home=Tier.PINNED) for p in first.placements)
    moved = replace(made, phases=(replace(first, placements=apart),), fingerprint="")
    trap = next(one for one in CATALOG if "windows" in one.name and "fp8" in one.name)
    assert trap.objection(moved, net, where) is not None


CASES: dict[str, Cases] = {
    "component-larger-than-device": Cases(
        steps=lambda: _whole(_small(), _big()),
        spared=lambda: _streamed(_small(), _big()),
        excludes=(("strategy", "phased"),),
        relevant=lambda: _streamed(_small(), _big()),
        needle="transformer has 22.10 GiB of weights for 16.00 GiB",
        irrelevant=lambda: _whole(_small(), _small()),
    ),
    "activations-left-out": Cases(
        steps=lambda: _phase_changed(_whole(_small()), activation_bytes=0),
        spared=lambda: _phase_changed(_whole(_small(), limits=Limits(reserve=0)), activation_bytes=0),
        excludes=(("strategy", "phased"),),
        relevant=lambda: _streamed(replace(_small(), activation_bytes=2 * GIB), budget=5 * GIB),
        needle="the weights of text_encoder (4.10 GiB) would fill 5.00 GiB",
        irrelevant=lambda: _streamed(replace(_small(), activation_bytes=2 * GIB), budget=7 * GIB),
    ),
    "unified-memory-offload": Cases(
        steps=lambda: _streamed(_small(), where=machine(unified=True)),
        spared=lambda: _streamed(_small(), where=machine(unified=True), home=Tier.DISK),
        excludes=_outside(""),
        relevant=lambda: _streamed(_small(), where=machine(unified=True), home=Tier.DISK),
        needle="would free nothing",
        irrelevant=lambda: _streamed(_small()),
    ),
    "pinned-past-limit": Cases(
        steps=lambda: _with_pinned(5 * GIB),
        spared=lambda: _with_pinned(4 * GIB),
        excludes=(("", "pinned"),),
        relevant=lambda: _streamed(_small(), where=machine(pinnable=GIB)),
        needle="only 1.00 GiB of RAM may be page-locked",
        irrelevant=lambda: _streamed(_small(), where=machine(pinnable=16 * GIB)),
    ),
    "expert-cache-too-small": Cases(
        steps=lambda: _phase_changed(_streamed(_moe()), expert_cache_bytes=2 * 15 * MIB - 1),
        spared=lambda: _phase_changed(_streamed(_moe()), expert_cache_bytes=2 * 15 * MIB),
        excludes=(("strategy", "stream"),),
    ),
    "experts-moved-whole": Cases(
        relevant=lambda: _phase_changed(_streamed(_moe()), expert_cache_bytes=GIB),
        needle="would move 3.75 GiB of experts for a token that uses 240.0 MiB",
        irrelevant=lambda: _streamed(_moe()),
    ),
    "fp8-offload-on-windows": Cases(
        steps=lambda: _formatted("fp8", on("windows", "wddm"), resident=1),
        spared=lambda: _formatted("fp8", on("linux", "wsl2"), resident=1),
        excludes=(("fp8", "pinned"), ("fp8", "ram"), ("fp8", "disk")),
    ),
    "fp8-on-mps": Cases(steps=lambda: _formatted("fp8", _mps()), spared=lambda: _formatted("int8", _mps()), excludes=(("fp8", "*"),)),
    "kept-blocks-converted": Cases(
        steps=lambda: _formatted("int8", part=_kept()),
        spared=lambda: _partly_formatted(),
        excludes=(("int8", "*"),),
        relevant=lambda: _partly_formatted(),
        needle="1 blocks lose too much in int8 (layers.1 is one)",
        irrelevant=lambda: _formatted("int8"),
    ),
    "stacked-experts-unconverted": Cases(
        steps=lambda: _formatted("int8", part=_moe()),
        spared=lambda: _formatted("int8", part=_moe(count=32)),
        excludes=(("int8", "*"),),
        relevant=lambda: _formatted("int8", part=_moe(count=32)),
        needle="1.88 GiB are stacked experts",
        irrelevant=lambda: _formatted("int8"),
    ),
    "tiles-are-not-lossless": Cases(
        steps=lambda: _tiled(quality="lossless"),
        spared=lambda: _tiled(_vae(lossless=True), quality="lossless"),
        excludes=(("variant", "tiling"),),
    ),
    "variant-not-offered": Cases(
        steps=lambda: _tiled(replace(_vae(), variants=())),
        spared=lambda: _tiled(),
        excludes=(("variant", "tiling"),),
        relevant=lambda: _whole(component("vae", [], 160 * MIB, 9 * GIB, class_name="AutoencoderTiny")),
        needle="AutoencoderTiny has neither tiles nor slices, and 9.00 GiB",
        irrelevant=lambda: _whole(component("vae", [], 160 * MIB, GIB, class_name="AutoencoderTiny")),
    ),
    "vae-decode-peak": Cases(
        relevant=lambda: _tiled(),
        needle="vae in one piece takes 12.16 GiB",
        irrelevant=lambda: _tiled(budget=13 * GIB),
    ),
    "attention-slicing-with-offload": Cases(
        steps=lambda: _sliced(_unet(), 4),
        spared=lambda: _sliced(_unet(), None),
        excludes=(("variant", "attention-slicing"),),
        relevant=lambda: _streamed(_unet()),
        needle="unet is streamed",
        irrelevant=lambda: _streamed(_small()),
    ),
    "attention-slicing-on-mps": Cases(
        steps=lambda: _sliced(_unet(), None, _mps()),
        spared=lambda: _sliced(_unet(), None),
        excludes=(("variant", "attention-slicing"),),
    ),
    "memory-spills-into-ram": Cases(
        relevant=lambda: _streamed(_big(), where=on("windows", "wddm")),
        needle="22.10 GiB of weights and 16.00 GiB free",
        irrelevant=lambda: _streamed(_big(), where=on("linux")),
    ),
    "expandable-segments-on-wddm": Cases(
        relevant=lambda: _streamed(_big(), where=on("windows", "wddm")),
        needle="runs under WDDM",
        irrelevant=lambda: _whole(_small(), where=on("windows", "wddm"), strategy="direct"),
    ),
}


def _with_pinned(nbytes: int) -> Case:
    made, net, where = _streamed(_small(), where=machine(pinnable=4 * GIB))
    return replace(made, estimate=replace(made.estimate, pinned_bytes=nbytes)), net, where


def _partly_formatted() -> Case:
    made, net, where = _formatted("int8", part=_kept())
    placements = tuple(replace(p, format="") if p.block == "layers.1" else p for p in made.phases[0].placements)
    return replace(made, phases=(replace(made.phases[0], placements=placements),)), net, where


def test_every_trap_with_logic_about_plans_has_its_cases():
    assert {trap.name for trap in CATALOG if trap.step is not None or trap.relevance is not None} == set(CASES)
    for trap in CATALOG:
        if trap.name in CASES:
            cases = CASES[trap.name]
            assert (trap.step is not None) == (cases.steps is not None and cases.spared is not None)
            assert (trap.relevance is not None) == (cases.relevant is not None and cases.irrelevant is not None)


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if cases.steps])
def test_objects_to_a_plan_that_steps_into_it(name):
    cases, trap = CASES[name], trap_named(name)
    assert trap is not None
    assert cases.steps is not None
    objection = trap.objection(*cases.steps())
    assert isinstance(objection, Objection)
    assert objection.exclude == cases.excludes
    assert objection.remedy == trap.what_we_do
    assert objection.evidence
    assert name in [o.trap for o in objections(*cases.steps())]


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if cases.spared])
def test_spares_a_plan_that_does_not(name):
    cases, trap = CASES[name], trap_named(name)
    assert trap is not None
    assert cases.spared is not None
    assert trap.objection(*cases.spared()) is None


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if cases.relevant])
def test_names_what_was_steered_around_with_its_numbers(name):
    cases = CASES[name]
    assert cases.relevant is not None
    found = {a.trap: a for a in avoided(*cases.relevant())}
    assert cases.needle in found[name].reason
    assert found[name].remedy


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if cases.irrelevant])
def test_says_nothing_where_it_was_never_in_the_way(name):
    cases = CASES[name]
    assert cases.irrelevant is not None
    assert name not in {a.trap for a in avoided(*cases.irrelevant())}


def test_exclusions_come_first_and_each_trap_once():
    made, net, where = _streamed(_small(), _big())
    first = Objection("fp8-offload-on-windows", (("fp8", "ram"),), "why", "what instead", "evidence")
    mine = Objection("component-larger-than-device", (("strategy", "phased"),), "too large", "streamed", "evidence")
    found = avoided(made, net, where, [first, mine, first])
    assert [a.trap for a in found] == ["fp8-offload-on-windows", "component-larger-than-device"]
    assert found[0] == Avoided("fp8-offload-on-windows", "why", "what instead")
    assert found[1].reason == "too large"


def test_nothing_is_said_of_a_plan_that_simply_fits():
    made, net, where = _whole(_small(), where=on("linux"), strategy="direct")
    assert objections(made, net, where) == []
    assert avoided(made, net, where) == ()
