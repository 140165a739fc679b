"""What a run asks of a pipeline before anything is loaded: how many prompts at once, and whether its call takes what was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from overflowml_core import session
from overflowml_core.cli.running.pipeline import CallFailed, Pipeline
from overflowml_core.cli.running.prompts import Prompt
from overflowml_core.cli.running.settings import Settings
from overflowml_core.errors import BadLimits, DoesNotFit, Unsupported
from overflowml_core.facts import Limits
from overflowml_core.plan import Estimate

PROMPTS = [Prompt("a")] * 20


class FromText:
    def __call__(
        self, prompt: Any = None, height: int = 8, num_inference_steps: int = 50, generator: Any = None, output_type: str = ""
    ) -> Any:
        return SimpleNamespace(images=["no picture"])


class FromImage:
    def __call__(self, prompt: Any, image: Any, strength: float = 0.8) -> None:
        """Takes a picture."""


class FromNothing:
    def __call__(self, batch_size: int = 1) -> None:
        """Takes no prompt."""


def pipeline(kind: type = FromText, **settings: Any) -> Pipeline:
    return Pipeline(kind(), None, Settings("digest", **settings))


def _plans(monkeypatch: pytest.MonkeyPatch, estimates: dict[int, Estimate]) -> None:
    """Plans by batch; others do not fit."""

    def make_plan(network: object, limits: Limits, workload: Any, machine: object) -> Any:
        if workload.batch not in estimates:
            raise DoesNotFit("too large")
        return SimpleNamespace(estimate=estimates[workload.batch])

    monkeypatch.setattr(session, "detect", lambda: None)
    monkeypatch.setattr(session, "describe", lambda pipe, workload: None)
    monkeypatch.setattr(session, "make_plan", make_plan)


@pytest.mark.parametrize(
    ("totals_s", "best"),
    [
        ({1: 10.0, 2: 12.0, 4: 20.0, 8: 60.0}, 4),  # 10, 6, 5 and 7.5 seconds a picture
        ({1: 10.0, 2: 19.9, 4: 39.5, 8: 79.0}, 1),  # not worth it
        ({1: 10.0, 2: 12.0}, 2),  # four do not fit
    ],
)
def test_the_batch_with_the_least_time_for_a_picture_is_taken(monkeypatch, totals_s, best):
    _plans(monkeypatch, {batch: Estimate(total_s=total_s) for batch, total_s in totals_s.items()})
    assert pipeline().best_batch(PROMPTS, Limits()) == best
    assert pipeline().best_batch(PROMPTS[:1], Limits()) == 1


def test_without_times_the_fewest_streamed_bytes_for_a_picture_win(monkeypatch):
    _plans(monkeypatch, {1: Estimate(streamed_bytes=100), 2: Estimate(streamed_bytes=150), 4: Estimate(streamed_bytes=400)})
    assert pipeline().best_batch(PROMPTS, Limits()) == 2
    _plans(monkeypatch, {batch: Estimate() for batch in (1, 2, 4, 8)})
    assert pipeline().best_batch(PROMPTS, Limits()) == 1, "nothing is streamed: nothing is saved"


def test_not_even_one_that_fits_is_an_error(monkeypatch):
    _plans(monkeypatch, {})
    with pytest.raises(DoesNotFit):
        pipeline().best_batch(PROMPTS, Limits())


def test_the_plan_is_made_for_the_largest_picture():
    prompts = [Prompt("a", width=8, height=64), Prompt("b", width=32), Prompt("c")]
    work = pipeline(height=32, call={"num_inference_steps": 5}).workload(prompts, 3)
    assert (work.width, work.height, work.steps, work.batch) == (32, 32, 5, 3)
    assert pipeline().workload([Prompt("a")], 1).height is None


def test_calls_that_the_pipeline_cannot_take_are_refused():
    pipeline(call={"num_inference_steps": 3}).check(PROMPTS)
    for kind, words in ((FromNothing, "takes no prompt"), (FromImage, "needs image")):
        with pytest.raises(Unsupported, match=words):
            pipeline(kind).check(PROMPTS)
    for settings, prompt, words in (
        ({"call": {"guidance_scale": 3}}, Prompt("a"), "guidance_scale: FromText has no such argument"),
        ({"negative": "blur"}, Prompt("a"), "negative_prompt: FromText has no such argument"),
        ({}, Prompt("a", negative=""), "negative_prompt: FromText has no such argument"),
        ({}, Prompt("a", width=8), "width: FromText has no such argument"),
    ):
        with pytest.raises(BadLimits, match=words):
            pipeline(**settings).check([prompt])


def test_what_is_no_picture_is_an_error():
    pytest.importorskip("torch")
    with pytest.raises(CallFailed, match="one picture for each prompt"):
        pipeline().draw([Prompt("a"), Prompt("b")], [1, 2])
