"""The ways to ask transformers for us: the flag, a device map, the environment, ``pipeline``; and what happens to those who do not ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import overflowml
from overflowml_core import environment
from overflowml_core.errors import BadLimits, BadSize, Managed, OverflowmlError
from overflowml_core.facts import Bytes
from tests.hosts import models
from tests.hosts.check import assert_same, smallest, whole_blocks

Saved = Callable[..., Path]
_EXACT = {"device_memory": Bytes(80_000), "reserve": 0}


def _plan_of(model: Any) -> overflowml.Plan:
    attached = overflowml.attachment(model)
    assert attached is not None
    return attached.plan


@pytest.mark.parametrize(
    ("request_", "device_bytes"),
    [
        (True, None),
        ("8GB", 8 * 10**9),
        ("8 GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        (2**30, 2**30),
        (overflowml.Limits("1GB"), 10**9),
        ({"device_memory": "1GB", "host_memory": "2GB"}, 10**9),
        ({}, None),
    ],
)
def test_overflow(request_: object, device_bytes: int | None, saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=request_)
    plan = _plan_of(model)
    assert plan.limits.device_bytes == device_bytes
    assert plan.strategy == "direct"
    assert_same(models.call("llama", model), models.call("llama", tf.AutoModelForCausalLM.from_pretrained(saved("llama"))))


@pytest.mark.parametrize(("device_map", "device_bytes"), [("overflowml", None), ("overflowml:8GB", 8 * 10**9), ("overflowml:", None)])
def test_device_map(device_map: str, device_bytes: int | None, saved: Saved) -> None:
    for cls in (tf.AutoModelForCausalLM, tf.LlamaForCausalLM, tf.AutoModel):
        plan = _plan_of(cls.from_pretrained(saved("llama"), device_map=device_map))
        assert plan.limits.device_bytes == device_bytes


def test_device_map_and_overflow_together_mean_overflow(saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="overflowml", overflow=_EXACT)
    assert _plan_of(model).strategy == "stream"


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "balanced", torch.device("cpu"), 0])
def test_another_device_map_contradicts_overflow(device_map: object, saved: Saved) -> None:
    with pytest.raises(BadLimits, match="give one of them") as caught:
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map=device_map, overflow="8GB")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device_map", ["overflowml:lots", "overflowml:8", "overflowml:-1GB"])
def test_bad_size_in_a_device_map(device_map: str, saved: Saved) -> None:
    with pytest.raises(BadSize) as caught:
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map=device_map)
    assert device_map.partition(":")[2] in str(caught.value)


def test_device_map_that_only_begins_like_ours_is_the_hosts_own_error(saved: Saved) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- the host's
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="overflowmlx")
    assert not isinstance(caught.value, OverflowmlError)


@pytest.mark.parametrize(
    ("max_memory", "device_bytes", "host_bytes"),
    [
        ({0: "1GB", "cpu": "2GB"}, 10**9, 2 * 10**9),
        ({"cpu": "2GB"}, None, 2 * 10**9),
        ({0: 2**30}, 2**30, None),
        ({"cuda:0": "1GB"}, 10**9, None),
        ({}, None, None),
    ],
)
def test_max_memory(max_memory: dict[Any, Any], device_bytes: int | None, host_bytes: int | None, saved: Saved) -> None:
    limits = _plan_of(tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="overflowml", max_memory=max_memory)).limits
    assert (limits.device_bytes, limits.host_bytes) == (device_bytes, host_bytes)


def test_overflow_wins_over_max_memory(saved: Saved) -> None:
    limits = _plan_of(tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow="3GB", max_memory={0: "1GB"})).limits
    assert limits.device_bytes == 3 * 10**9


@pytest.mark.parametrize("max_memory", [{0: "1GB", 1: "1GB"}, "8GB", ["8GB"], {0: "lots"}])
def test_bad_max_memory(max_memory: object, saved: Saved) -> None:
    with pytest.raises(OverflowmlError) as caught:
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="overflowml", max_memory=max_memory)
    assert "\n" not in str(caught.value)


def test_environment_fills_what_the_call_leaves_open(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.DEVICE_MEMORY, "1GB")
    monkeypatch.setenv(environment.HOST_MEMORY, "2GB")
    monkeypatch.setenv(environment.RESERVE, "1MB")
    plan = _plan_of(tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=True))
    assert plan.budget.device_bytes == 10**9
    assert plan.budget.host_bytes <= 2 * 10**9
    assert plan.phases[0].activation_bytes == 10**6
    plan = _plan_of(tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow="3GB"))
    assert plan.budget.device_bytes == 3 * 10**9
    monkeypatch.setenv(environment.DEVICE_MEMORY, "lots")
    with pytest.raises(BadSize, match="lots"):
        tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=True)


def test_environment_alone_asks_for_nothing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.DEVICE_MEMORY, "1GB")
    assert overflowml.attachment(tf.AutoModelForCausalLM.from_pretrained(saved("llama"))) is None


@pytest.mark.parametrize("options", [{}, {"overflow": False}, {"overflow": None}])
def test_model_that_is_not_ours_has_no_trace_of_us(options: dict[str, Any], saved: Saved) -> None:
    overflowml.uninstall()
    theirs = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
    overflowml.install()
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), **options)
    assert overflowml.attachment(model) is None
    for (name, mine), (_, other) in zip(model.named_modules(), theirs.named_modules(), strict=True):
        assert set(vars(mine)) == set(vars(other)), name
        assert not mine._forward_pre_hooks, name
        assert not mine._forward_hooks, name
    for (name, mine), (_, other) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert set(vars(mine)) == set(vars(other)), name
        assert torch.equal(mine, other), name


def test_model_after_release_has_no_trace_of_us(saved: Saved) -> None:
    theirs = tf.AutoModelForCausalLM.from_pretrained(saved("llama"))
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    models.call("llama", model)
    overflowml.release(model)
    for (name, mine), (_, other) in zip(model.named_modules(), theirs.named_modules(), strict=True):
        assert set(vars(mine)) == set(vars(other)), name
        assert not mine._forward_pre_hooks, name
        assert not mine._forward_hooks, name
    assert not overflowml.release(model)
    assert model.to(torch.float64).dtype is torch.float64


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.half(), lambda m: m.float(), lambda m: m.cuda(), lambda m: m.to(torch.float16)]
)
def test_moving_a_managed_model_is_refused(move: Callable[[Any], Any], saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    with pytest.raises(Managed, match=r"overflowml\.release\(model\)"):
        move(model)
    assert_same(models.call("llama", model), models.call("llama", tf.AutoModelForCausalLM.from_pretrained(saved("llama"))))


def test_device_map_of_a_managed_model_tells_where_everything_is(saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=whole_blocks(saved("llama")))
    assert next(iter(model.hf_device_map.items())) == ("", "cpu")
    assert [k for k, v in model.hf_device_map.items() if v == "disk"] == [f"model.layers.{i}" for i in range(4)]
    assert model.device == torch.device("cpu")


def test_model_cannot_be_managed_twice(saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    with pytest.raises(OverflowmlError, match="managed by overflowml already"):
        overflowml.manage(model, True)
    overflowml.release(model)
    assert overflowml.manage(model, smallest(model)) is overflowml.attachment(model)


def test_part_of_a_managed_model_is_found_in_a_larger_one(saved: Saved) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    with pytest.raises(OverflowmlError, match=r"model\.0 is managed by overflowml already"):
        overflowml.manage(torch.nn.Sequential(model), True)
    assert overflowml.release(model)


def test_weights_cannot_be_written_into_a_managed_model(saved: Saved) -> None:
    """Streamed blocks are read from their files, so new values would be lost without a word."""
    model = tf.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=smallest(saved("llama")))
    other = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.raises(Managed, match="load_state_dict"):
        model.load_state_dict(other)
    overflowml.release(model)
    model.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


# ---- pipeline


@pytest.fixture(scope="session")
def chat_folder(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token per word."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    folder = tmp_path_factory.mktemp("chat")
    tf.AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder)
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3").save_pretrained(
        folder
    )
    return folder


def _say(pipe: Any) -> str:
    return str(pipe("w5 w17 w42", max_new_tokens=6, do_sample=False)[0]["generated_text"])


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "overflowml"},
        {"device_map": "overflowml:8GB"},
        {"overflow": True},
        {"overflow": "8GB"},
        {"overflow": _EXACT},
        {"overflow": overflowml.Limits(**_EXACT)},
        {"model_kwargs": {"overflow": overflowml.Limits(**_EXACT)}},
        {"overflow": _EXACT, "model_kwargs": {"attn_implementation": "eager"}},
        {"overflow": _EXACT, "dtype": torch.bfloat16},
    ],
)
def test_pipeline_of_a_folder(options: dict[str, Any], chat_folder: Path) -> None:
    plain = {key: value for key, value in options.items() if key == "dtype"}
    expected = _say(tf.pipeline("text-generation", model=str(chat_folder), **plain))
    pipe = tf.pipeline("text-generation", model=str(chat_folder), **options)
    plan = _plan_of(pipe.model)
    assert plan.strategy == ("stream" if "_EXACT" in repr(options) or plan.limits.device_bytes == 80_000 else "direct")
    assert _say(pipe) == expected


def test_pipeline_with_positional_model(chat_folder: Path) -> None:
    assert _plan_of(tf.pipeline("text-generation", str(chat_folder), overflow=_EXACT).model).strategy == "stream"


def test_pipeline_with_its_tokenizer_named(chat_folder: Path) -> None:
    pipe = tf.pipeline("text-generation", model=str(chat_folder), tokenizer=str(chat_folder), overflow=_EXACT)
    assert _plan_of(pipe.model).strategy == "stream"


def test_pipeline_of_a_live_model(chat_folder: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(chat_folder)
    model = tf.AutoModelForCausalLM.from_pretrained(chat_folder)
    expected = _say(tf.pipeline("text-generation", model=model, tokenizer=tokenizer))
    pipe = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, overflow=_EXACT)
    assert pipe.model is model
    assert _plan_of(model).strategy == "stream"
    assert _say(pipe) == expected
    managed = tf.AutoModelForCausalLM.from_pretrained(chat_folder, overflow=_EXACT)
    assert _say(tf.pipeline("text-generation", model=managed, tokenizer=tokenizer)) == expected
    assert _say(tf.pipeline("text-generation", model=managed, tokenizer=tokenizer, overflow=True)) == expected


@pytest.mark.parametrize("overflow", [False, None])
def test_pipeline_without_us(overflow: object, chat_folder: Path) -> None:
    pipe = tf.pipeline("text-generation", model=str(chat_folder), overflow=overflow)
    assert overflowml.attachment(pipe.model) is None


def test_pipeline_with_a_bad_request_is_one_clear_error(chat_folder: Path) -> None:
    for options in ({"overflow": "lots"}, {"device_map": "overflowml:lots"}, {"overflow": 8}):
        with pytest.raises(BadSize):
            tf.pipeline("text-generation", model=str(chat_folder), **options)
    with pytest.raises(overflowml.DoesNotFit):
        tf.pipeline("text-generation", model=str(chat_folder), overflow=overflowml.Limits.exactly(device_memory=10, reserve=0))
    with pytest.raises(BadLimits, match="give one of them"):
        tf.pipeline("text-generation", model=str(chat_folder), overflow=True, device_map="auto")


_ORDER = """
import sys
{first}
{second}
from overflowml_core import session
import importlib
if "transformers" not in session.plugins().names():
    overflowml.uninstall()
    session.plugins().register(importlib.import_module("overflowml_transformers"), "transformers")
    overflowml.install()
session.plugins().accelerators = lambda: []
import torch, transformers
limits = overflowml.Limits.exactly(device_memory=80_000, reserve=0)
for pipe in (
    pipeline("text-generation", model=sys.argv[1], overflow=limits),
    pipeline("text-generation", model=transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]),
             tokenizer=transformers.AutoTokenizer.from_pretrained(sys.argv[1]), overflow=limits),
    pipeline("text-generation", model=sys.argv[1], device_map="overflowml"),
):
    attached = overflowml.attachment(pipe.model)
    assert attached is not None
    print("plan:", attached.plan.strategy)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False])
def test_pipeline_imported_by_name_before_and_after_us(ours_first: bool, chat_folder: Path, import_path: dict[str, str]) -> None:
    lines = ["import overflowml", "from transformers import pipeline"]
    first, second = lines if ours_first else reversed(lines)
    script = _ORDER.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", script, str(chat_folder)], env=import_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("plan:")] == ["plan: stream", "plan: stream", "plan: direct"]
