"""Files of prompts: three forms, one meaning, and errors that name the line."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.cli.running.pipeline import in_batches
from overflowml_core.cli.running.prompts import BadPrompts, Prompt, digest_of, read_prompts
from overflowml_core.cli.running.settings import Settings, call_arguments
from overflowml_core.errors import BadLimits


def test_lines_of_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n  zwei Füchse  \n".encode())
    assert read_prompts(path) == (Prompt("a fox"), Prompt("zwei Füchse"))


def test_json_lines_and_csv_say_the_same(tmp_path):
    lines, table = tmp_path / "prompts.jsonl", tmp_path / "prompts.csv"
    lines.write_text(
        '{"prompt": "a fox, red", "negative_prompt": "blur", "seed": 7, "size": "64x32"}\n\n{"prompt": "two", "width": 8}\n"three"\n'
    )
    table.write_text('prompt,negative,seed,width,height\n"a fox, red",blur,7,64,32\ntwo,,,8,\nthree,,,,\n')
    expected = (Prompt("a fox, red", "blur", 7, 64, 32), Prompt("two", width=8), Prompt("three"))
    assert read_prompts(lines) == read_prompts(table) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "", "no prompt"),
        ("a.txt", " \n\n", "no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2: no JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.jsonl", "3", "line 1: expected an object"),
        ("a.jsonl", '{"prompt": ""}', "line 1: prompt=''"),
        ("a.jsonl", '{"text": 3}', "line 1: prompt=3"),
        ("a.jsonl", '{"prompt": "x", "seed": -1}', "seed=-1: not a whole number"),
        ("a.jsonl", '{"prompt": "x", "seed": true}', "seed=True: not a whole number"),
        ("a.jsonl", '{"prompt": "x", "width": 0.5}', "width=0.5: not a whole number"),
        ("a.jsonl", '{"prompt": "x", "size": "big"}', "size='big': not like 768x512"),
        ("a.jsonl", '{"prompt": "x", "sed": 1}', "unknown field 'sed'"),
        ("a.jsonl", '{"prompt": "x", "negative": []}', "negative=[]: no text"),
        ("a.csv", "prompt,seed\nx\n", "line 2: not as many cells"),
        ("a.csv", "prompt,seed\nx,1,2\n", "line 2: not as many cells"),
        ("a.csv", 'prompt,seed\n"x,1\n', "no CSV"),
        ("a.csv", "seed\n1\n", "line 2: prompt=None"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_where(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadPrompts) as refused:
        read_prompts(path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "; write" in str(refused.value)


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "bytes.txt", tmp_path / "missing.txt", tmp_path, tmp_path / "a\0b.txt"):
        with pytest.raises(BadPrompts):
            read_prompts(path)


@given(st.binary(max_size=200), st.sampled_from(["txt", "jsonl", "csv"]))
def test_any_bytes_are_prompts_or_an_error_of_ours(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_bytes(data)
    with contextlib.suppress(BadPrompts):
        assert all(one.prompt for one in read_prompts(path))


def test_the_digest_changes_with_every_field():
    variants = [Prompt("a"), Prompt("b"), Prompt("a", ""), Prompt("a", seed=0), Prompt("a", width=8), Prompt("a", height=8)]
    assert len({digest_of((one,)) for one in variants} | {digest_of((Prompt("a"), Prompt("a")))}) == len(variants) + 1


SIZES = st.builds(Prompt, st.just("x"), st.sampled_from([None, "no"]), width=st.sampled_from([None, 8, 16]))


@given(st.lists(SIZES, min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_every_prompt_once_in_order_and_of_one_size(prompts, size):
    found = in_batches(prompts, Settings(""), size)
    assert [index for batch in found for index in batch] == list(range(len(prompts)))
    assert all(1 <= len(batch) <= size for batch in found)
    assert all(len({prompts[index].width for index in batch}) == 1 for batch in found)


def test_arguments_of_the_call():
    assert call_arguments(["true_cfg_scale=4.5", "lang=de", "sigmas=[1, 0.5]", "a=b=c"], 4, None) == {
        "true_cfg_scale": 4.5,
        "lang": "de",
        "sigmas": [1, 0.5],
        "a": "b=c",
        "num_inference_steps": 4,
    }
    for wrong in ("nothing", "=3", "a b=3", "generator=1", "prompt=x"):
        with pytest.raises(BadLimits, match="--set"):
            call_arguments([wrong], None, None)
    with pytest.raises(BadLimits, match="--guidance"):
        call_arguments(["guidance_scale=3"], None, 4.0)
    assert json.loads(json.dumps(Settings("x", call={"a": [1]}).document()))["call"] == {"a": [1]}
