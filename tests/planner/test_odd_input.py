"""Whatever a description says, planning ends in a plan or in DoesNotFit."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import (
    Accelerator,
    Block,
    BlockWork,
    Component,
    ComputeRate,
    Experts,
    HostMemory,
    Limits,
    Machine,
    Network,
    PassProfile,
    Rates,
    Variant,
    Work,
    Workload,
)
from overflowml_core.formats import Format
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan, timeline_of, what_if
from tests.planner.build_timed import ALL

COUNT = st.sampled_from([0, 1, 2, 7, 1000, 10**9, 2**40])
RATE = st.sampled_from([0.0, 1e-3, 1.0, 1e9, 1e15])
DTYPE = st.sampled_from(["BF16", "F32", "U8", "odd"])
WORKS = st.lists(
    st.builds(Work, st.sampled_from(["matmul", "conv", "attention", "memory"]), DTYPE, COUNT, COUNT, COUNT, st.integers(0, 9)), max_size=2
).map(tuple)
RATES = st.builds(
    Rates,
    RATE,
    RATE,
    RATE,
    pageable_h2d_bytes_per_s=RATE,
    memory_bytes_per_s=RATE,
    compute=st.lists(st.builds(ComputeRate, st.just("matmul"), DTYPE, RATE), max_size=3).map(tuple),
    launch_s=st.sampled_from([0.0, 1e-5]),
)
FORMAT = st.builds(
    Format, st.sampled_from(["fp8", "int4"]), st.sampled_from([0.5, 4, 8, 64]), st.sampled_from(["minimal", "any"]), st.just(0.1), RATE
)


@st.composite
def components(draw, name):
    sizes = draw(st.lists(st.integers(0, 2**24), max_size=9))
    bank = st.none() | st.builds(Experts, st.integers(0, 300), st.integers(0, 2**20), st.integers(0, 300))
    blocks = tuple(
        Block(
            f"b{i}",
            size // 2,
            size,
            size,
            draw(st.sampled_from([(), (("BF16", size),), (("U8", size),)])),
            draw(st.none() | st.sampled_from(["b0", "b1", "nowhere"])),
            draw(st.booleans()),
            draw(st.sampled_from([0, size // 4, size, 10 * size])),
            draw(bank),
        )
        for i, size in enumerate(sizes)
    )

    def profile() -> PassProfile:
        rows = draw(st.sampled_from([0, len(blocks), len(blocks), len(blocks), len(blocks) + 1]))
        works = tuple(BlockWork(draw(WORKS), draw(COUNT), draw(st.integers(0, 3))) for _ in range(rows))
        kind = draw(st.sampled_from(["prefill", "token", "denoise"]))
        return PassProfile(kind, draw(st.sampled_from([0, 1, 3, 10**6])), draw(st.integers(0, 2**24)), works, draw(WORKS))

    profiles = tuple(profile() for _ in range(draw(st.integers(0, 2))))
    variants = tuple(
        Variant(n, draw(st.booleans()), (profile(),)) for n in draw(st.lists(st.sampled_from(["slicing", "tiling"]), max_size=2))
    )
    fixed = draw(st.integers(0, 2**22))
    total = (("BF16", fixed + sum(sizes)),)
    return Component(name, "C", blocks, fixed, fixed // 2, total, draw(st.sampled_from("ab")), 3, 0, "none", "", profiles, variants)


@st.composite
def machines(draw):
    kind = draw(st.sampled_from(["cuda", "mps", "cpu", "two"]))
    memory, host = draw(st.integers(0, 2**29)), draw(st.integers(0, 2**30))
    cards = [
        Accelerator(kind.replace("two", "cuda"), "A", i, memory, memory, kind == "mps", rates=draw(st.none() | RATES)) for i in range(2)
    ]
    found = tuple(cards[: {"cpu": 0, "two": 2}.get(kind, 1)])
    return Machine(found, HostMemory(host, host, host // 2, 2), draw(RATES), draw(COUNT), cpu_rates=draw(st.none() | RATES))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["x", "y"]), unique=True, min_size=1).flatmap(lambda names: st.tuples(*(components(name) for name in names))),
    machines(),
    st.lists(FORMAT, max_size=2, unique_by=lambda f: f.name).map(tuple),
    st.sampled_from([frozenset(), ALL]),
    st.sampled_from(["lossless", "minimal", "any"]),
    st.integers(1, 2**28),
    st.booleans(),
)
def test_planning_ends_in_a_plan_or_does_not_fit(parts, mach, formats, abilities, quality, budget, allow_disk):
    parts = tuple(sorted(parts, key=lambda c: c.phase))
    net = Network(parts, "odd", "Odd", "f")
    limits = replace(Limits.exactly(device_memory=budget, quality=quality), allow_disk=allow_disk)
    try:
        plan = make_plan(net, mach, Workload(), limits, formats, abilities)
    except DoesNotFit:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.summary()
    assert timeline_of(plan, net, mach, formats).drawn_s >= 0
    assert len(what_if(net, mach, Workload(), limits, formats, abilities, plan)) <= 4
    for phase in plan.phases:
        assert phase.estimate.device_peak_bytes == phase.device_bytes
