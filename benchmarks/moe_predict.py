"""Predicted against measured seconds of a token, for caches of several sizes. Each budget is a load in a process and group of its own.

A first session, on texts of its own, leaves what it counted of the experts in the run's own cache folder, as it would in a user's; every
prediction starts from that, and none from what the budgets before it counted. The machine and the model's own operations are measured anew
before each budget and behind it, and the prediction is the mean of both: the machine is shared, and changes its pace within a minute.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_contest import IMPORTS, SCRIPT, Settings, counted, hit_rate
from report import Report
from stream_model import weight_files
from stream_system import drop_cache, make_cage
from stream_worker import SideFailed, Worker

HEAT, KEPT_HEAT = Path("cache") / "heat", Path("heat-of-the-session")
"""In the work folder: where heat maps are, and the copy of what the first session left."""

WARM_TOKENS = 24
"""Of another answer before the clock runs: a cache that the plan takes for warm shall be."""

SESSION_ANSWERS = 4
"""Of the session that the predictions know."""

ANSWERS = 3
"""To the same prompts for each budget: texts differ in how alike their tokens choose, and a prediction knows no text."""


@dataclass(frozen=True)
class Size:
    """One budget.

    Attributes:
        budget_bytes: of the load.
        cache_bytes: what its plan left to experts.
        strategy: of the plan that ran.
        predicted_s, measured_s: of a token; predictions from a calibration before and from one behind, on the average.
        predicted_prefill_s, measured_prefill_s: of the prompt.
        predicted_hit_rate, hit_rate: of the tokens that were measured; None where no experts ran apart.
        predicted_missed_bytes, fetched_bytes: of a token.
    """

    budget_bytes: int
    cache_bytes: int
    strategy: str
    predicted_s: float
    measured_s: float
    predicted_prefill_s: float | None
    measured_prefill_s: float
    predicted_hit_rate: float | None
    hit_rate: float | None
    predicted_missed_bytes: int
    fetched_bytes: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1


def calibrate(settings: Settings) -> float:
    """Measure the machine and the model's operations, without a memory limit. Returns seconds.

    Raises:
        SideFailed: it cannot be done.
    """
    worker = Worker("calibrate", settings.work / "calibrate.log", script=SCRIPT)
    try:
        worker.ready(IMPORTS["ours"], settings.threads)
        seconds: float = worker.ask("calibrate", model=str(settings.model), **settings.workload)["seconds"]
        return seconds
    finally:
        worker.close()


def budgets_of(settings: Settings, shares: tuple[float, ...], bank_bytes: int) -> list[int]:
    """Budgets that leave about these shares of all experts to the cache; what else a plan needs is taken from one for the present budget.

    Args:
        settings: of the run.
        shares: of ``bank_bytes``.
        bank_bytes: of all experts of all layers.

    Raises:
        SideFailed: the plan for the present budget keeps no experts apart.
    """
    worker = Worker("predict", settings.work / "predict.log", script=SCRIPT)
    try:
        worker.ready(IMPORTS["ours"], settings.threads)
        cache_bytes = _predicted(worker, settings, settings.budget_bytes)["expert_cache_bytes"]
    finally:
        worker.close()
    if not cache_bytes:
        raise SideFailed(f"the plan for a budget of {settings.budget_bytes} bytes keeps no experts apart")
    return [settings.budget_bytes - cache_bytes + int(share * bank_bytes) for share in shares]


def first_session(settings: Settings) -> None:
    """Answer a few texts and release the model, so that what was counted of its experts is kept; and set a copy of that aside.

    Raises:
        SideFailed: it cannot be done.
    """
    cage = make_cage(f"overflowml-moe-session-{os.getpid()}", settings.limit_bytes)
    worker = Worker("ours", settings.work / "session.log", cage=cage, script=SCRIPT)
    try:
        worker.ready(IMPORTS["ours"], settings.threads)
        worker.load("ours", settings.model, settings.work / "scratch-session", settings.budget_bytes)
        for text in range(SESSION_ANSWERS):
            worker.ask("answer", **settings.answer_of(400 + text, settings.prompt_tokens, settings.new_tokens))
        worker.ask("quit")
    finally:
        worker.close()
        if cage is not None:
            cage.remove()
    shutil.copytree(settings.work / HEAT, settings.work / KEPT_HEAT)


def _as_after_the_session(settings: Settings) -> None:
    kept, present = settings.work / KEPT_HEAT, settings.work / HEAT
    if kept.exists():
        shutil.rmtree(present, ignore_errors=True)
        shutil.copytree(kept, present)


def _predicted(worker: Worker, settings: Settings, budget_bytes: int) -> dict[str, Any]:
    return worker.ask("predict", model=str(settings.model), budget_bytes=budget_bytes, **settings.workload)


def measure(settings: Settings, budgets: list[int], report: Report, notes: list[str]) -> list[Size]:
    """Predict and measure each budget, and add the worst error."""
    sizes = []
    for number, budget_bytes in enumerate(budgets):
        try:
            sizes.append(_size(replace(settings, budget_bytes=budget_bytes), number))
        except SideFailed as error:
            notes.append(f"a budget of {budget_bytes} bytes: {error}")
            print(notes[-1], file=sys.stderr, flush=True)
            continue
        one = sizes[-1]
        print(
            f"# {budget_bytes / 1e9:.2f} GB: predicted {one.predicted_s:.3f} s, {one.measured_s:.3f} s a token", file=sys.stderr, flush=True
        )
    if sizes:
        report.add("prediction.max_rel_error", max(abs(size.error) for size in sizes), f"of a token's seconds, over {len(sizes)} caches")
        report.add("prediction.mean_rel_error", statistics.fmean(abs(size.error) for size in sizes), "of a token's seconds")
    return sizes


def _size(settings: Settings, number: int) -> Size:
    _as_after_the_session(settings)
    calibrate(settings)
    planned, predicted, answers = _answered(settings, number)
    _as_after_the_session(settings)
    calibrate(settings)
    worker = Worker("predict", settings.work / f"predict-{number}.log", script=SCRIPT)
    try:
        worker.ready(IMPORTS["ours"], settings.threads)
        again = _predicted(worker, settings, planned)
    finally:
        worker.close()
    return _sized(settings, _mean(predicted, again), answers)


def _mean(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both predictions on the average; what is no time is the same in both."""
    passes = {name: (seconds + other["passes"][name]) / 2 for name, seconds in one["passes"].items()}
    return {**one, "token_s": (one["token_s"] + other["token_s"]) / 2, "passes": passes}


def _answered(settings: Settings, number: int) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """The budget that is planned for, the prediction, and what the tokens took."""
    cage = make_cage(f"overflowml-moe-size-{number}-{os.getpid()}", settings.limit_bytes)
    worker = Worker("ours", settings.work / f"size-{number}.log", cage=cage, script=SCRIPT)
    try:
        worker.ready(IMPORTS["ours"], settings.threads)
        loaded = worker.load("ours", settings.model, settings.work / f"scratch-size-{number}", settings.budget_bytes)["told"]
        # A load knows no workload, and keeps more for activations: what is predicted is a cache of the size that it has.
        planned = settings.budget_bytes
        predicted = _predicted(worker, settings, planned)
        beyond_bytes = predicted["expert_cache_bytes"] - loaded["expert_cache_bytes"]
        if beyond_bytes and loaded["expert_cache_bytes"]:
            planned -= beyond_bytes
            predicted = _predicted(worker, settings, planned)
        if predicted["token_s"] is None:
            raise SideFailed("its plan predicts no time")
        drop_cache(weight_files(settings.model))
        worker.ask("answer", **settings.answer_of(300, settings.prompt_tokens, WARM_TOKENS))
        answers = [
            worker.ask("answer", **settings.answer_of(200 + text, settings.prompt_tokens, settings.new_tokens)) for text in range(ANSWERS)
        ]
        return planned, predicted, answers
    finally:
        worker.close()
        if cage is not None:
            cage.remove()


def _sized(settings: Settings, predicted: dict[str, Any], answers: list[dict[str, Any]]) -> Size:
    told = [(answer["told_before"], answer["told"]) for answer in answers]
    seconds = [one for answer in answers for one in answer["seconds"]]
    return Size(
        budget_bytes=settings.budget_bytes,
        cache_bytes=answers[0]["told"]["expert_cache_bytes"],
        strategy=answers[0]["told"]["strategy"],
        predicted_s=predicted["token_s"],
        measured_s=statistics.fmean(seconds),
        predicted_prefill_s=predicted["passes"].get("prefill"),
        measured_prefill_s=statistics.median(answer["prefill_s"] for answer in answers),
        predicted_hit_rate=predicted["hit_rates"].get("token"),
        hit_rate=hit_rate(told),
        predicted_missed_bytes=predicted["missed_bytes"].get("token") or 0,
        fetched_bytes=counted(told, "fetched_bytes") / len(seconds),
    )


def table(sizes: list[Size]) -> str:
    """The sizes as Markdown."""
    lines = [
        "| budget | cache of experts | plan | hit rate predicted | measured | read a token predicted | measured "
        "| token predicted | measured | off by | prefill predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        cells = [
            f"{size.budget_bytes / 1e9:.2f} GB",
            f"{size.cache_bytes / 1e9:.2f} GB",
            size.strategy,
            "" if size.predicted_hit_rate is None else f"{size.predicted_hit_rate:.3f}",
            "" if size.hit_rate is None else f"{size.hit_rate:.3f}",
            f"{size.predicted_missed_bytes / 1e6:.0f} MB",
            f"{size.fetched_bytes / 1e6:.0f} MB",
            f"{size.predicted_s:.3f} s",
            f"{size.measured_s:.3f} s",
            f"{size.error:+.1%}",
            "" if size.predicted_prefill_s is None else f"{size.predicted_prefill_s:.2f} s",
            f"{size.measured_prefill_s:.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
