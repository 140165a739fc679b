"""``overflowml run`` with a real pipeline, and batches of a managed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.run_model import write_pipeline
from overflowml_core.cli.running.pipeline import Pipeline

CORPUS = "a fox\na red house by a lake\ntwo boats\n"
OPTIONS = ("--steps", "2", "--seed", "7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("small") / "pipeline")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unprofiled: None) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command line and gives its exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from overflowml_core.cli import app

        monkeypatch.setattr(sys, "argv", ["overflowml", "run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def pixels(out: Path) -> dict[str, bytes]:
    from PIL import Image

    return {path.name: Image.open(path).tobytes() for path in sorted(out.glob("*.png"))}


Plain = Callable[[list[str], list[int]], list[bytes]]


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    """A function that makes the same pictures at once by diffusers alone."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw(texts: list[str], seeds: list[int]) -> list[bytes]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return [image.tobytes() for image in pipe(prompt=texts, generator=generators, num_inference_steps=2).images]

    return draw


@pytest.fixture(scope="module")
def alone(plain: Plain) -> list[bytes]:
    """Each picture of CORPUS computed by itself."""
    return [data for place, text in enumerate(CORPUS.splitlines()) for data in plain([text], [7 + place])]


def test_pictures_are_those_of_the_plain_pipeline(run, folder, prompts, tmp_path, plain, alone):
    out = tmp_path / "out"
    status, printed, _ = run(
        folder, "--prompts", prompts, "--out", out, *OPTIONS, "--batch", 3, "--budget", "2MB", "--reserve", 0, "--json"
    )
    told = json.loads(printed)
    assert (status, told["pictures"], told["made"], told["batch"], told["seed"]) == (0, 3, 3, 3, 7)
    together = list(pixels(out).values())
    assert together == plain(CORPUS.splitlines(), [7, 8, 9])
    # A seed gives the same picture in any batch, up to what kernels round in the company of others.
    assert max(abs(a - b) for one, other in zip(alone, together, strict=True) for a, b in zip(one, other, strict=True)) <= 1
    # Started again, nothing is made, and the seed is that of before.
    status, printed, _ = run(folder, "--prompts", prompts, "--out", out, "--steps", 2, "--json")
    assert (status, json.loads(printed)["found"], json.loads(printed)["seed"]) == (0, 3, 7)


def test_one_by_one_a_picture_depends_on_nothing_but_its_prompt_and_seed(run, folder, tmp_path, alone):
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "two boats", "seed": 9}\n')
    run(folder, "--prompts", one, "--out", tmp_path / "one", "--steps", 2, "--batch", 1)
    assert pixels(tmp_path / "one")["00000.png"] == alone[2]


def test_sizes_and_negative_prompts_of_the_file_are_taken(run, folder, tmp_path):
    from PIL import Image

    table = tmp_path / "prompts.csv"
    table.write_text("prompt,negative,size\nfox,blur,32x16\nfox,,32x16\nfox,,\n")
    status, _, _ = run(folder, "--prompts", table, "--out", tmp_path / "out", "--steps", 1, "--seed", 1, "--batch", 4, "--set", "eta=0.5")
    assert status == 0
    assert [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))] == [(32, 16), (32, 16), (32, 32)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines[1:]] == [[0], [1], [2]]
    assert lines[0]["settings"]["call"] == {"eta": 0.5, "num_inference_steps": 1}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells start what runs in the background with interrupts ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drops_the_batch_under_way_and_the_same_command_goes_on(
    run, folder, prompts, tmp_path, monkeypatch, alone, number, status
):
    out, draw = tmp_path / "out", Pipeline.draw
    calls: list[int] = []

    def disturbed(self: Pipeline, *arguments: Any) -> list[Any]:
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return draw(self, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Pipeline, "draw", disturbed)
    ended, _, told = run(folder, "--prompts", prompts, "--out", out, *OPTIONS, "--batch", 1)
    assert ended == status
    assert f"stopped with 1 of 3 pictures in {out}; the same command goes on from there" in told
    assert signal.getsignal(signal.SIGTERM) is handler
    assert run(folder, "--prompts", prompts, "--out", out, *OPTIONS, "--batch", 1)[0] == 0
    assert list(pixels(out).values()) == alone


def test_bad_input_is_one_line_with_a_way_out(run, folder, prompts, tmp_path, saved):
    def refused(*arguments: object, words: str, source: Path = folder) -> None:
        ended, printed, told = run(source, "--prompts", prompts, "--out", tmp_path / "bad", *arguments)
        assert ended == 2, told
        line = told.strip().splitlines()[-1]
        assert line.startswith("overflowml: ")
        assert words in line
        assert "; " in line
        assert not printed

    refused(source=tmp_path / "missing", words="give the folder of a diffusers pipeline")
    refused(source=saved("llama"), words="no diffusers pipeline")
    refused("--batch", "0", words="--batch='0'")
    refused("--batch", "many", words="--batch='many'")
    refused("--budget", "lots", words="--budget='lots'")
    refused("--set", "no_such=1", words="no_such: StableDiffusionPipeline has no such argument")
    refused("--set", "guidance_scale=[1]", words="refused the call")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    refused(source=broken, words="diffusion_pytorch_model.safetensors")


def test_a_budget_that_holds_nothing_is_a_no(run, folder, prompts, tmp_path):
    ended, _, told = run(folder, "--prompts", prompts, "--out", tmp_path / "out", *OPTIONS, "--budget", "5KB", "--reserve", 0)
    assert ended == 1
    assert "budget" in told
