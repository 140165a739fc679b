"""Hundreds of pictures and thousands of tokens while a second process takes and frees the device's memory at random.

    python benchmarks/soak.py --json benchmarks/results/soak.json --table benchmarks/results/soak.md
    python benchmarks/soak.py --device cpu
    python benchmarks/soak.py --device cuda --seconds 300

A small Flux pipeline makes 300 pictures, a small Llama 10 000 tokens, each of its own size and seed. Every result is held against that of
the plain model, which ran before without a neighbour. The status is 1 where a result is missing or different, memory grew, or a peak was
over the budget.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

import torch  # noqa: E402 -- behind the path and the libraries' switches
from report import Report  # noqa: E402
from soak_places import PLACES, Place, Room, anonymous_bytes  # noqa: E402
from soak_work import LARGE, MIDDLE, SMALL, TINY, Answers, Item, Pictures, Work  # noqa: E402

import overflowml  # noqa: E402
from overflowml import Limits  # noqa: E402
from overflowml_core import description, session  # noqa: E402
from overflowml_core.facts import Tier  # noqa: E402
from overflowml_core.loading import Loading, loading  # noqa: E402
from overflowml_core.plan import PhasePlan  # noqa: E402
from overflowml_core.runtime.room import with_room  # noqa: E402

_SCALES = {"tiny": TINY, "small": SMALL, "middle": MIDDLE, "large": LARGE}
_WARM_UP = 0.1
"""Share of the items after which memory is expected not to grow any more."""
_SAMPLES = 20
"""Of anonymous memory at each end, whose medians are compared."""
_MOST_GROWTH = 0.01
_SHARE = 0.7
"""Of what lies between the least and all of the model, that the budget holds."""


@dataclass
class Outcome:
    """What came of one kind of work."""

    units: int = 0
    items: int = 0
    identical: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    anonymous: list[int] = field(default_factory=list)
    over_bytes: int = 0
    room: Room = field(default_factory=lambda: Room(0, 0, 0))
    neighbour: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth_bytes(self) -> int:
        """Of anonymous memory from the end of the warm-up to the end."""
        warm = self.anonymous[max(1, int(len(self.anonymous) * _WARM_UP)) - 1 :]
        count = max(1, min(_SAMPLES, len(warm) // 2))
        return int(statistics.median(warm[-count:]) - statistics.median(warm[:count]))

    @property
    def growth(self) -> float:
        """The same as a share."""
        return self.growth_bytes / max(1, self.anonymous[-1] - self.growth_bytes)

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        found = [*self.failures, *self.wrong, *self.problems]
        if self.identical != self.items:
            found.append(f"{self.items - self.identical} of {self.items} results are not those of an undisturbed run")
        if self.growth > _MOST_GROWTH:
            found.append(f"anonymous memory grew by {self.growth:.1%}")
        if self.over_bytes > 0:
            found.append(f"the peak was {self.over_bytes} bytes over the budget")
        return found


def main() -> None:
    """Run both kinds of work, print the figures, and end with status 1 where something is not as it should be."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", choices=PLACES, default="vgpu")
    asked.add_argument("--images", type=int, default=300)
    asked.add_argument("--tokens", type=int, default=10_000)
    asked.add_argument("--seconds", type=float, help="go round in 24 pictures and about as many answers for so long, half of it each")
    asked.add_argument("--scale", choices=_SCALES, help="of the models; without it middle on a CPU, large on a GPU, else small")
    asked.add_argument("--quick", action="store_true", help="20 pictures and 500 tokens")
    asked.add_argument("--seed", type=int, default=0, help="of the neighbour")
    asked.add_argument("--json", type=Path)
    asked.add_argument("--table", type=Path)
    given = asked.parse_args()
    scale = _SCALES[given.scale or {"cpu": "middle", "cuda": "large", "vgpu": "small"}[given.device]]
    images, tokens = (20, 500) if given.quick else (given.images, given.tokens)
    if given.seconds:
        images, tokens = 24, 12 * scale.new_tokens
    prepare()
    report, outcomes = Report("soak"), dict[str, tuple[Work, Outcome]]()
    place: Place = PLACES[given.device]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OVERFLOWML_CACHE", str(Path(folder) / "cache"))
        for work, units in ((Pictures(scale), images), (Answers(scale), tokens)):
            if units:
                own = Path(folder) / work.name
                own.mkdir()
                outcome = soak(work, work.items(units), place, own, given.seed, given.seconds and given.seconds / 2)
                outcomes[work.name] = (work, outcome)
                add_figures(report, work, outcome)
                report.write(given.json)  # what there is, should the next part be ended
                if given.table is not None:
                    given.table.write_text(table(given.device, outcomes), encoding="utf-8")
    faults = [f"{name}: {fault}" for name, (_, outcome) in outcomes.items() for fault in outcome.faults]
    print(*faults[:20], sep="\n")
    sys.exit(1 if faults else 0)


def prepare() -> None:
    """The hosts without their bars, their plugins registered, one thread."""
    import diffusers
    import transformers

    for host in (diffusers, transformers):
        host.utils.logging.set_verbosity_error()
        host.utils.logging.disable_progress_bar()
    for name in ("transformers", "diffusers"):
        if name not in session.plugins().names():
            session.plugins().register(importlib.import_module(f"overflowml_{name}"), name)
    overflowml.install()
    logging.getLogger("overflowml").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def soak(work: Work, items: list[Item], place: Place, folder: Path, seed: int, seconds: float | None = None) -> Outcome:
    """Run items undisturbed, then under a neighbour, and compare.

    Args:
        work: what an item is.
        items: each is run once without a neighbour.
        place: where.
        folder: empty.
        seed: of the neighbour.
        seconds: go round in the items for so long; None runs each once.
    """
    outcome = Outcome()
    expected, reserve_bytes = undisturbed(work, items, place, folder / "model")
    collect()
    with place.opened(), _unprofiled(reserve_bytes is not None):
        budget_bytes = budget_for(work, folder / "model", reserve_bytes)
        limits = Limits.exactly(device_memory=budget_bytes, reserve=reserve_bytes, trial=False)
        unread = Loading(limits)
        with loading(unread):
            model = work.load(folder / "model")
        session.manage(model, limits, work.workload, unread)
        engine: Any = overflowml.attachment(model)
        if not engine.plan.managed:
            raise SystemExit(f"{work.name}: the model is not managed under {budget_bytes} bytes")
        try:
            outcome.room = room = measured_room(work, model, engine, items, place)
            place.begin_peak()
            start_s = time.perf_counter()
            with place.disturbed(room, folder, seed) as neighbour:
                for index in _rounds(len(items), seconds):
                    _run(work, model, items[index], place, expected[index], outcome)
            outcome.seconds = time.perf_counter() - start_s
        finally:
            outcome.events = _counts(engine)
            overflowml.release(model)
        outcome.over_bytes = place.peak_bytes() - room.budget_bytes
        outcome.neighbour, outcome.problems = neighbour.done, place.problems()
        if neighbour.done["over_bytes"] > 0:
            outcome.problems.append(f"both processes held {neighbour.done['over_bytes']} bytes more than there are")
    return outcome


def undisturbed(work: Work, items: list[Item], place: Place, folder: Path) -> tuple[list[str], int | None]:
    """Digests of the plain model's results, and what its passes took beside the weights; the model is saved in the folder."""
    plain = work.make()
    plain.save_pretrained(folder)
    plain.to(place.device)
    place.begin_peak()
    before_bytes = place.taken_bytes()
    found = []
    for item in items:
        found.append(_digest(work.run(plain, item, place.device)))
        place.between()
    return found, None if before_bytes is None else place.peak_bytes() - before_bytes


def _unprofiled(is_measured: bool) -> AbstractContextManager[object]:
    """No profiles, which cost seconds, where what passes take was measured."""
    return mock.patch.object(description, "_measured", return_value=None) if is_measured else nullcontext()


def _rounds(count: int, seconds: float | None) -> Iterator[int]:
    if seconds is None:
        yield from range(count)
        return
    end_s = time.perf_counter() + seconds
    for index in cycle(range(count)):
        if time.perf_counter() > end_s:
            return
        yield index


def _run(work: Work, model: Any, item: Item, place: Place, expected: str, outcome: Outcome) -> None:
    outcome.items += 1
    try:
        found = _digest(work.run(model, item, place.device))
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is counted, and the next item shows what it left behind
        outcome.failures.append(f"item {item.seed}: {type(error).__name__}: {error}")
    else:
        outcome.units += work.units(item)
        outcome.identical += found == expected
    place.between()
    gc.collect()
    outcome.anonymous.append(anonymous_bytes())


def _digest(result: torch.Tensor) -> str:
    return hashlib.sha256(repr((result.dtype, tuple(result.shape))).encode() + result.contiguous().numpy().tobytes()).hexdigest()


def _counts(engine: Any) -> dict[str, int]:
    """Events of each kind; the list itself keeps the latest alone."""
    parts = [part.split(" ", 1) for part in engine.events.counted().split(", ") if part]
    return {kind: int(count) for count, kind in parts}


def budget_for(work: Work, folder: Path, reserve_bytes: int | None) -> int:
    """A budget between the least and all of a model."""

    def plan(nbytes: int | None) -> overflowml.Plan:
        limits = Limits.exactly(device_memory=nbytes, reserve=reserve_bytes, trial=False)
        return overflowml.plan(folder, limits, work.workload, **work.options)

    try:
        plan((reserve_bytes or 0) + 1)
    except overflowml.DoesNotFit as refusal:
        least_bytes = refusal.near_misses[0].needed_bytes
    whole_bytes = plan(None).estimate.device_peak_bytes
    return least_bytes + int(_SHARE * (whole_bytes - least_bytes))


def measured_room(work: Work, model: Any, engine: Any, items: list[Item], place: Place) -> Room:
    """What the largest items take under the plan, and with all blocks streamed: between the two a neighbour may be."""
    largest = [max(items, key=lambda item: work.extents(item)[k]) for k in range(len(work.extents(items[0])))]
    peaks = []
    plan, budget_bytes = engine.plan, engine.plan.budget.device_bytes
    streamed = replace(plan, phases=tuple(_streamed(phase, budget_bytes) for phase in plan.phases))
    for tried in (streamed, plan):
        engine.rearrange(tried)
        place.begin_peak()
        for item in largest:
            work.run(model, item, place.device)
        peaks.append(place.peak_bytes())
    return Room(budget_bytes, peaks[1], peaks[0])


def _streamed(phase: PhasePlan, budget_bytes: int) -> PhasePlan:
    """The phase with all of its blocks streamed, one by one."""
    slot_bytes = max((place.stored_bytes for place in phase.placements), default=0)
    places = tuple(replace(place, tier=Tier.DISK, home=Tier.DISK) for place in phase.placements)
    least_bytes = replace(phase, placements=places, slot_bytes=slot_bytes, staging_bytes=slot_bytes).device_bytes
    return with_room(phase, budget_bytes - least_bytes, budget_bytes) or phase


def collect() -> None:
    """What nobody uses goes back to the system; what lives now is not looked through again."""
    from overflowml_core.runtime.device import trim_heap

    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim_heap()


def add_figures(report: Report, work: Work, outcome: Outcome) -> None:
    """The figures of one kind of work."""
    name = work.name
    report.add(f"{name}.{work.unit}", outcome.units, work.unit)
    report.add(f"{name}.results", outcome.items, "results")
    report.add(f"{name}.failures", len(outcome.failures), "failures")
    report.add(f"{name}.identical", outcome.identical, "results")
    report.add(f"{name}.anonymous_growth", 100 * outcome.growth, "%")
    report.add(f"{name}.anonymous_growth_bytes", outcome.growth_bytes, "bytes")
    report.add(f"{name}.over_budget", outcome.over_bytes, "bytes")
    report.add(f"{name}.budget", outcome.room.budget_bytes, "bytes")
    report.add(f"{name}.undisturbed_peak", outcome.room.most_bytes, "bytes")
    report.add(f"{name}.least_peak", outcome.room.least_bytes, "bytes")
    for kind in ("demoted", "promoted", "retried", "not retried"):
        report.add(f"{name}.{kind.replace(' ', '_')}", outcome.events.get(kind, 0), "events")
    report.add(f"{name}.neighbour_squeezes", outcome.neighbour.get("squeezes", 0), "changes")
    report.add(f"{name}.neighbour_releases", outcome.neighbour.get("releases", 0), "changes")
    report.add(f"{name}.neighbour_most", outcome.neighbour.get("most_bytes", 0), "bytes")
    report.add(f"{name}.seconds", outcome.seconds, "s")


def table(device: str, outcomes: dict[str, tuple[Work, Outcome]]) -> str:
    """The same for people."""
    lines = [
        f"## A neighbour that takes and frees memory at random ({device})",
        "",
        "| | results | failures | identical | demoted | promoted | retried | anonymous memory | peak over budget | neighbour |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for work, one in outcomes.values():
        counts = " | ".join(str(one.events.get(kind, 0)) for kind in ("demoted", "promoted", "retried"))
        lines.append(
            f"| {one.units} {work.unit} | {one.items} | {len(one.failures)} | {one.identical} | {counts} | {one.growth:+.2%} "
            f"({one.growth_bytes:+,} bytes) | {one.over_bytes:+,} bytes | {one.neighbour.get('squeezes', 0)} squeezes, "
            f"{one.neighbour.get('releases', 0)} releases, "
            f"up to {one.neighbour.get('most_bytes', 0):,} of {one.room.budget_bytes:,} bytes |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
