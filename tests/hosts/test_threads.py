"""Hosts' models and pipelines in several threads: right where plain ones are, and given back by whoever comes first."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import overflowml
from overflowml_core.errors import Unsupported
from tests.hosts import models, pipelines
from tests.hosts.check import assert_same, whole_blocks
from tests.runtime.build import TIMEOUT_S, in_threads
from tests.runtime.test_turns import ended, started

pytestmark = pytest.mark.usefixtures("unprofiled")


def _llama() -> Any:
    model = models.build("llama")
    model.generation_config.pad_token_id = 0
    return model


def _generate(model: Any, seed: int) -> torch.Tensor:
    tokens = (models.TOKENS + seed) % 100 + 3
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)  # type: ignore[no-any-return]


def _managed_pipeline() -> tuple[Any, Any]:
    pipe = pipelines.build("stable_diffusion")
    expected = pipelines.run("stable_diffusion", pipe)
    overflowml.manage(pipe, whole_blocks(pipe))
    return pipe, expected


def test_generate_from_two_threads_gives_what_plain_models_give() -> None:
    model = _llama()
    expected = [_generate(model, seed) for seed in range(2)]
    overflowml.manage(model, whole_blocks(model))

    def work(index: int) -> None:
        for _ in range(2):
            assert_same(_generate(model, index), expected[index])

    in_threads(2, work)
    assert overflowml.release(model)


def test_a_pipeline_for_each_thread_over_the_same_managed_components_is_right() -> None:
    """A pipeline's scheduler counts steps: plain pipelines need one for each thread, too."""
    pipe, expected = _managed_pipeline()
    pipes = [pipe, type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})]
    in_threads(2, lambda index: assert_same(pipelines.run("stable_diffusion", pipes[index]), expected))
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    assert overflowml.release(pipe)


def test_one_pipeline_behind_a_lock_is_right() -> None:
    pipe, expected = _managed_pipeline()
    lock = threading.Lock()

    def work(index: int) -> None:
        with lock:
            assert_same(pipelines.run("stable_diffusion", pipe), expected)

    in_threads(2, work)
    assert overflowml.release(pipe)


def test_one_pipeline_in_two_threads_neither_hangs_nor_stays_wrong() -> None:
    """Its scheduler mixes both calls up, managed or not: either may fail. The next call is right."""
    pipe, expected = _managed_pipeline()
    for thread, _ in [started(lambda: pipelines.run("stable_diffusion", pipe)) for _ in range(2)]:
        ended(thread)
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    assert overflowml.release(pipe)
    assert_same(pipelines.run("stable_diffusion", pipe), expected)


# ---- the ends of a managed model


def test_a_managed_model_is_not_managed_again() -> None:
    pipe, expected = _managed_pipeline()
    for target in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(overflowml.OverflowmlError, match=r"managed by overflowml already; call overflowml\.release"):
            overflowml.optimize_pipeline(target)
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    assert overflowml.release(pipe)
    overflowml.manage(pipe, whole_blocks(pipe))
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    assert overflowml.release(pipe)


def test_of_two_threads_that_manage_one_model_one_does() -> None:
    model = _llama()
    expected = _generate(model, 0)
    limits = whole_blocks(model)
    results = [started(lambda: overflowml.manage(model, limits)) for _ in range(2)]
    for thread, _ in results:
        ended(thread)
    refused = [found[0] for _, found in results if isinstance(found[0], overflowml.OverflowmlError)]
    assert len(refused) == 1
    assert "already" in str(refused[0])
    assert_same(_generate(model, 0), expected)
    assert overflowml.release(model)
    assert overflowml.attachment(model) is None
    assert_same(_generate(model, 0), expected)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_handle_is_removed_twice_and_by_another_thread(is_streamed: bool) -> None:
    model = _llama()
    expected = _generate(model, 0)
    made = overflowml.manage(model, whole_blocks(model) if is_streamed else True)
    results = [started(lambda: overflowml.release(model)) for _ in range(3)]
    for thread, _ in results:
        ended(thread)
    assert sorted(found[0] for _, found in results) == [False, False, True]  # type: ignore[type-var]
    assert not overflowml.release(model)
    assert not made.detach()
    assert overflowml.attachment(model) is None
    assert_same(_generate(model, 0), expected)


def test_a_removal_waits_for_the_pass_of_another_thread() -> None:
    model = _llama()
    expected = _generate(model, 0)
    overflowml.manage(model, whole_blocks(model))
    is_reached, may_go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        is_reached.set()
        assert may_go.wait(TIMEOUT_S)

    hook = model.model.layers[1].register_forward_hook(hold)
    running, result = started(lambda: _generate(model, 0))
    assert is_reached.wait(TIMEOUT_S)
    ending, ends = started(lambda: overflowml.release(model))
    ending.join(0.05)
    assert not ends
    may_go.set()
    for thread in (running, ending):
        ended(thread)
    hook.remove()
    assert ends == [True]
    assert_same(result[0], expected)  # the rest of it may have run with plain weights
    assert_same(_generate(model, 0), expected)


def test_a_removal_inside_a_pass_is_refused_and_the_pass_goes_on() -> None:
    pipe, expected = _managed_pipeline()
    refusals: list[str] = []

    def remove(*_: object) -> None:
        with pytest.raises(Unsupported) as caught:
            overflowml.release(pipe)
        refusals.append(str(caught.value))

    hook = pipe.unet.mid_block.register_forward_hook(remove)
    assert_same(pipelines.run("stable_diffusion", pipe), expected)
    hook.remove()
    assert "inside a call" in refusals[0]
    assert overflowml.attachment(pipe) is not None
    assert overflowml.release(pipe)


def test_a_removal_between_the_steps_of_a_pipeline_ends_in_plain_weights() -> None:
    """A callback of the pipeline is outside of all modules: the rest of the picture is made with plain weights."""
    pipe, expected = _managed_pipeline()
    call = type(pipe).__call__
    gone: list[bool] = []

    def at_end(own: Any, step: int, time: object, tensors: dict[str, Any]) -> dict[str, Any]:
        gone.append(overflowml.release(own))
        return tensors

    class Ending:
        """The pipeline with that callback."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

        def __call__(self, **options: Any) -> Any:
            return call(pipe, callback_on_step_end=at_end, **options)

    assert_same(pipelines.run("stable_diffusion", Ending()), expected)
    assert gone == [True, False]
