"""``plan --machines``: who holds which layers, and lines that can be copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overflowml_core.cli.serving import heads_of

HOST = {"total_bytes": "64GB", "core_count": 16}


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    path = tmp_path / "machines.json"
    desk = {"name": "desk", "count": 3, "accelerators": ["RTX 4090"], "host": HOST}
    server = {"name": "server", "count": 2, "accelerators": ["RTX 3090", "RTX 3090"], "host": HOST}
    path.write_text(json.dumps({"machines": [desk, server]}))
    return path


def test_a_model_that_takes_two_machines_is_served_over_ray(run, machines):
    status, out, _ = run("plan", "70", "--machines", machines, "--prompt-tokens", 2048, "--new-tokens", 512, "--batch", 4)
    assert status == 0
    assert "takes 2 of 5 machines: 2 x server" in out
    assert "desk alone: not enough of them" in out
    lines = [line.strip() for line in out.splitlines()]
    assert "ray start --head --port=6379" in lines
    assert "ray start --address=FIRST_MACHINE:6379" in lines
    serve = next(line for line in lines if "vllm serve" in line)
    assert serve == (
        "VLLM_PP_LAYER_PARTITION=32,32 vllm serve MODEL --tensor-parallel-size 2 --pipeline-parallel-size 2 --max-model-len 2560 "
        "--max-num-seqs 4 --distributed-executor-backend ray"
    )


def test_one_machine_needs_no_ray(run, machines):
    status, out, _ = run("plan", "30", "--machines", machines)
    assert status == 0
    assert "takes 1 of 5 machines: 1 x server" in out
    assert "ray" not in out
    assert "torchrun --nproc-per-node 2 SCRIPT.py" in out


def test_json_has_the_stages_and_the_lines(run, machines):
    status, out, _ = run("plan", "200", "--machines", machines, "--json")
    document = json.loads(out)
    assert status == 0
    assert {"name": "server", "count": 2} in document["machines"]
    assert document["alone"] == {"desk": None, "server": None}
    assert all(stage["offloaded_bytes"] > 0 for stage in document["stages"])
    assert "--cpu-offload-gb" in document["launch"]["then on the first machine"][0]
    assert document["token_s"] > 0


def test_a_model_in_a_folder_has_its_heads_and_its_name(run, machines, tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 25,
        "num_key_value_heads": 5,
        "head_dim": 8,
    }
    config |= {"hidden_size": 200, "intermediate_size": 400, "num_hidden_layers": 4, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert heads_of(str(folder)) == 25
    status, out, _ = run("plan", folder, "--machines", machines)
    assert status == 0
    assert f"vllm serve '{folder}' --tensor-parallel-size 1 " in out  # 25 heads are not halved


@pytest.mark.parametrize("text", ["", "[]", "{", '{"num_attention_heads": true}', '{"num_attention_heads": "8"}', '{"text_config": 3}'])
def test_a_configuration_that_says_nothing_of_heads_is_no_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert heads_of(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "RTX 4090"), "--gpu says nothing of several machines"),
        (("--quality", "minimal"), "--quality says nothing of several machines"),
        (("--compare",), "are of a plan for one machine"),
    ],
)
def test_options_of_one_machine_are_refused(run, machines, options, words):
    status, _, err = run("plan", "70", "--machines", machines, *options)
    assert status == 2
    assert words in err


def test_what_does_not_fit_and_what_is_no_file_are_told(run, machines, tmp_path):
    status, _, err = run("plan", "5000", "--machines", machines)
    assert (status, "do not fit on all 5 machines" in err) == (1, True)
    status, _, err = run("plan", "70", "--machines", tmp_path / "none.json")
    assert (status, "cannot be read" in err) == (2, True)
