"""What ran is kept, and a damaged file costs nothing but what it held."""

from __future__ import annotations

import logging

import pytest

from overflowml_comfyui.measurement import MOST_KEPT, Measurement, Measurements
from overflowml_comfyui.sampling import SamplerWatch


def test_the_newest_measurement_is_found_by_another_session(tmp_path):
    path = tmp_path / "folder" / "m.json"
    Measurements(path).keep("a", Measurement(2.0, 20, 5))
    Measurements(path).keep("a", Measurement(1.5, 30, None))

    assert Measurements(path).of("a") == Measurement(1.5, 30, None)
    assert Measurements(path).of("b") is None


def test_the_oldest_are_forgotten(tmp_path):
    kept = Measurements(tmp_path / "m.json")
    for number in range(MOST_KEPT + 2):
        kept.keep(str(number), Measurement(1.0, 1))

    assert kept.of("1") is None
    assert kept.of("2") is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": 1}', '{"a": {"step_s": "x", "steps": 1, "peak_bytes": 1}}'])
def test_a_damaged_file_is_named_and_replaced(tmp_path, caplog, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    kept = Measurements(path)
    with caplog.at_level(logging.WARNING, "overflowml"):
        assert kept.of("a") is None
    assert str(path) in caplog.text

    kept.keep("a", Measurement(1.0, 1))
    assert kept.of("a") == Measurement(1.0, 1)


def _device():
    import torch

    return torch.device("cpu")


def test_steps_are_counted_and_the_result_is_the_samplers_own():
    told = []
    watch = SamplerWatch(_device(), lambda *heard: told.append(heard[0]))

    def sampler(*arguments, **named):
        for _ in range(4):
            watch.around_step(lambda: None)
        return arguments, named

    assert watch.around_sampler(sampler, 1, x=2) == ((1,), {"x": 2})
    assert [one.steps for one in told] == [4]
    assert told[0].peak_bytes is None
    assert watch.around_sampler(sampler) == ((), {})
    assert told[1].steps == 4  # counted anew for each run


def test_a_cancelled_run_teaches_nothing():
    told = []
    watch = SamplerWatch(_device(), lambda *heard: told.append(heard[0]))

    def sampler():
        watch.around_step(lambda: None)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        watch.around_sampler(sampler)
    assert told == []


def test_a_report_that_fails_does_not_cost_the_picture(caplog):
    def tell(*_):
        raise OSError("no page")

    watch = SamplerWatch(_device(), tell)
    assert watch.around_sampler(lambda: watch.around_step(lambda: "picture")) == "picture"
    assert "no page" in caplog.text


def _latents(*shape):
    import torch

    return torch.empty(shape, device="meta")


def test_calls_of_the_model_and_what_they_carry_are_counted():
    told = []
    watch = SamplerWatch(_device(), lambda *heard: told.append(heard), lambda guider: (7, 3))

    def sampler(batches):
        def sample(guider, sigmas, extra, callback, noise):
            for batch in batches:
                watch.around_step(watch.around_pass, lambda x, t: None, _latents(batch, 16, 8, 8), 0.5)

        return sample

    for batches in ((2, 2), (1, 2)):
        watch.around_sampler(sampler(batches), "guider", None, {}, None, _latents(1, 16, 8, 8))
    (alike, shape), (mixed, _) = told

    assert (alike.steps, alike.passes, alike.samples, shape) == (2, 2, 2, (1, 16, 8, 8))
    assert (alike.resident_bytes, alike.streamed_bytes) == (7, 3)
    assert alike.pass_s == alike.step_s
    assert (mixed.passes, mixed.pass_s) == (0, None)  # passes of two sizes have no common time


def test_a_patcher_that_does_not_count_its_weights_is_sampled(caplog):
    told = []

    def count(_):
        raise AttributeError("model_size")

    watch = SamplerWatch(_device(), lambda *heard: told.append(heard[0]), count)

    assert watch.around_sampler(lambda guider: watch.around_step(lambda: "picture"), "guider") == "picture"
    assert told[0].resident_bytes == 0
    assert "model_size" in caplog.text
