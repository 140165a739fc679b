"""``overflowml llamacpp`` end to end: text, JSON, and one line for whatever is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

GPU = ("--gpu", "RTX 4090", "--ram", "64GB")


def test_a_model_on_a_machine_without_an_accelerator(run, monkeypatch):
    from overflowml_core.cli.demo.smollm2 import gguf_folder

    path = next(gguf_folder().glob("*.gguf"))
    status, out, err = run("llamacpp", path, "--ctx", 2048)
    assert (status, err) == (0, "")
    assert "no accelerator is found here, so the CPU computes" in out
    assert f"llama-server -m {path} -c 2048 -np 1 -ngl 0 -t " in out
    assert f"FROM {path}\nPARAMETER num_ctx 2048\nPARAMETER num_gpu 0\n" in out


def test_json_is_what_the_text_says(run, made, written):
    path = written(made.qwen3moe())
    document = json.loads(run("llamacpp", path, "--ctx", 4096, *GPU, "--json")[1])
    assert document["schema"] == 1
    assert document["model"]["experts"] == 8
    assert document["chosen"]["kind"] == "device"
    assert document["chosen"] in document["ways"]
    assert document["prediction"]["rates"] == "datasheet"
    text = run("llamacpp", path, "--ctx", 4096, *GPU)[1]
    assert document["llama_server"]["command"] in text
    assert all(line in text for line in document["ollama"]["modelfile"].splitlines())
    assert "<- recommended" in text


def test_a_budget_is_kept(run, made, written):
    path = written(made.qwen3moe(layers=6, count=64, inner=512))
    document = json.loads(run("llamacpp", path, "--ctx", 1024, *GPU, "--vram-budget", "300MB", "--json")[1])
    chosen = document["chosen"]
    assert chosen["device_bytes"] <= document["budget"]["device_bytes"] == 300 * 10**6
    assert chosen["n_cpu_moe"] > 0
    assert document["llama_server"]["arguments"][6:10] == ["-ngl", "7", "--n-cpu-moe", str(chosen["n_cpu_moe"])]
    assert document["ollama"]["notes"][0].startswith("Ollama has no parameter for --n-cpu-moe")


def test_a_budget_without_a_card_is_planned_with_and_not_timed(run, made, written):
    out = run("llamacpp", written(made.llama()), "--vram-budget", "12GB")[1]
    assert "-ngl 7" in out
    assert "No prediction" in out


def test_all_parts_are_counted_and_a_missing_one_is_named(run, made, tmp_path):
    metadata, tensors = made.llama()
    for part, members in enumerate((tensors[:9], tensors[9:])):
        keys = {"split.no": (2, part), "split.count": (2, 2)} | (metadata if part == 0 else {})
        (tmp_path / f"m-0000{part + 1}-of-00002.gguf").write_bytes(made.files.gguf_file(keys, members))
    second = tmp_path / "m-00002-of-00002.gguf"
    document = json.loads(run("llamacpp", second, *GPU, "--json")[1])
    assert document["model"]["weight_bytes"] == sum(made.files.tensor_bytes(kind, shape) for _, kind, shape in tensors)
    assert document["llama_server"]["arguments"][1].endswith("m-00001-of-00002.gguf")
    assert any("llama-gguf-split --merge" in note for note in document["ollama"]["notes"])
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    status, _, err = run("llamacpp", second)
    assert status == 2
    assert "m-00001-of-00002.gguf: missing" in err


def test_a_type_that_is_not_known_is_measured_by_offsets(run, made, tmp_path):
    metadata, tensors = made.llama()
    raw = bytearray(made.files.gguf_file(metadata, tensors))
    for name in (b"blk.1.ffn_up.weight", b"blk.5.ffn_down.weight"):
        at = raw.index(name) + len(name) + 4 + 16  # dimensions
        raw[at : at + 4] = struct.pack("<I", 137)
    path = tmp_path / "fork.gguf"
    path.write_bytes(raw)
    document = json.loads(run("llamacpp", path, *GPU, "--json")[1])
    assert document["model"]["weight_bytes"] == sum(made.files.tensor_bytes(kind, shape) for _, kind, shape in tensors)
    assert "2 tensors are of ggml types that are not known (type 137; the first is blk.1.ffn_up.weight)" in document["warnings"][0]


def test_more_context_than_the_model_was_trained_with_is_warned_of(run, made, written):
    out = run("llamacpp", written(made.llama()), "--ctx", 65536)[1]
    assert "Warning: --ctx=65536 is more than the 32768 tokens" in out


def test_less_ram_than_weights_is_warned_of(run, made, written, tmp_path):
    path = written(made.qwen3moe(layers=6, count=64, inner=512))
    out = run("llamacpp", path, "--gpu", "RTX 4090", "--ram", "250MB", "--vram-budget", "100MB")[1]
    assert "come from the disk again for each token" in " ".join(out.split())


def test_every_key_of_the_json_is_documented(run, made, written):
    page = (Path(__file__).parents[2] / "docs" / "llamacpp.md").read_text(encoding="utf-8")
    document = json.loads(run("llamacpp", written(made.qwen3moe()), *GPU, "--vram-budget", "15MB", "--json")[1])
    parts = [document, *(document[name] for name in ("model", "budget", "chosen", "prediction", "llama_server", "ollama"))]
    assert document["refused"]
    assert [key for part in (*parts, document["refused"][0]) for key in part if f"`{key}`" not in page] == []


def keys(made, **changes):
    metadata, tensors = made.llama()
    metadata = {key: value for key, value in metadata.items() if changes.get(key, "") is not None}
    return metadata | {key: value for key, value in changes.items() if value is not None}, tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "clip"}, "vision projector"),
        ({"general.type": "mmproj"}, "vision projector"),
        ({"general.type": "adapter"}, "adapter alone"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.attention.causal": False}, "is an encoder"),
        ({"llama.block_count": 5}, "its tensors make 6"),
    ],
)
def test_files_that_llama_server_does_not_answer_with(run, made, written, changes, words):
    status, _, err = run("llamacpp", written(keys(made, **changes)))
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


def test_more_layers_than_llama_cpp_takes_are_refused(run, made, written):
    metadata, tensors = made.base("llama", 513, **made.heads(4, 2))
    tensors += [(f"blk.{i}.attn_k.weight", "F16", (128, 256)) for i in range(513)]
    status, _, err = run("llamacpp", written((metadata, tensors)))
    assert (status, "llama.block_count is 513; llama.cpp takes at most 512 layers" in err) == (2, True)


def test_an_image_model_is_named(run, made, tmp_path):
    path = tmp_path / "flux.gguf"
    path.write_bytes(made.files.gguf_file({"general.architecture": "flux"}, [("double_blocks.0.img_attn.qkv.weight", "F16", (192, 64))]))
    status, _, err = run("llamacpp", path)
    assert (status, "image model" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ctx", "0"), "--ctx=0"),
        (("--ctx=-1",), "--ctx=-1"),
        (("--kv", "q5_0"), "--kv='q5_0': not one of f16, q8_0, q4_0, auto"),
        (("--vram-budget", "12"), "--vram-budget='12': it has no unit"),
        (("--gpu", "RTX 4900"), "no such accelerator"),
    ],
)
def test_wrong_options_are_named(run, made, written, options, words):
    status, _, err = run("llamacpp", written(made.llama()), *options)
    assert (status, words in err) == (2, True)


@pytest.mark.parametrize(("raw", "words"), [(b"PK\x03\x04" + bytes(60), "zip archive"), (b"GGUF\x03\x00\x00\x00\x05", "cut short")])
def test_files_that_are_none_are_named_in_json_too(run, tmp_path, raw, words):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    status, out, _ = run("llamacpp", path, "--json")
    assert status == 2
    assert words in json.loads(out)["error"]


def test_the_help_names_the_options(run):
    out = run("llamacpp", "--help")[1]
    assert all(option in out for option in ("--ctx", "--vram-budget", "--kv", "--gpu", "--json", "Example"))
