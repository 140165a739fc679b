"""Flags say what was decided, and survive a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from overflowml_core.errors import OverflowmlError
from overflowml_llamacpp.choice import CPU, EXPERTS, LAYERS, PART, Choice, Way
from overflowml_llamacpp.memory import CACHE_TYPES, Memory, Placement
from overflowml_llamacpp.modelfile import ollama_of
from overflowml_llamacpp.server import Request, arguments, command, override

F16, Q8 = CACHE_TYPES["f16"], CACHE_TYPES["q8_0"]
NOTHING = Memory(0, 0, 0, 0, 0, 0, 0, 0)
REQUEST = Request(Path("/models/m.gguf"), 16384, 8, 1)


def way(kind, gpu_layers, cpu_moe=0, cpu_tensors=(), cache=F16, token_s=0.1):
    return Way(kind, Placement(gpu_layers, cpu_moe, tuple(cpu_tensors), cache), NOTHING, token_s, token_s)


def test_the_arguments_of_experts_on_the_cpu():
    found = arguments(way(EXPERTS, 49, 20), REQUEST)
    assert found == ("-m", "/models/m.gguf", "-c", "16384", "-np", "1", "-ngl", "49", "--n-cpu-moe", "20", "-t", "8")


def test_a_cache_of_fewer_bits_needs_flash_attention():
    found = arguments(way(LAYERS, 20, cache=Q8), REQUEST)
    assert found[8:14] == ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")


@pytest.mark.parametrize(
    ("kind", "devices", "last"), [(CPU, 1, ("-dev", "none")), (CPU, 0, ("-t", "8")), (LAYERS, 2, ("-sm", "none", "-mg", "0"))]
)
def test_a_device_that_is_not_used_is_named(kind, devices, last):
    found = arguments(way(kind, 0), Request(REQUEST.file, 16384, 8, devices))
    assert found[-len(last) :] == last


def test_threads_of_another_machine_are_left_to_llama_cpp():
    assert "-t" not in arguments(way(LAYERS, 20), Request(REQUEST.file, 16384, None, 1))


def test_an_override_matches_the_tensors_it_names_and_no_others():
    pattern, _, place = override(("blk.2.ffn_up_exps", "blk.2.ffn_down_exps")).rpartition("=")
    products = ("gate", "up", "down", "gate_up")
    names = [f"blk.{i}.ffn_{p}_exps.{part}" for i in (0, 2, 12, 20, 22) for p in products for part in ("weight", "bias")]
    names += ["blk.2.ffn_up.weight", "blk.2.ffn_up_shexp.weight", "blk.2.ffn_up_chexps.weight"]
    matched = [name for name in names if re.search(pattern, name)]
    assert matched == [f"blk.2.ffn_{p}_exps.{part}" for p in ("up", "down") for part in ("weight", "bias")]
    assert place == "CPU"


def test_the_command_is_quoted_for_a_shell():
    path = Path("/models/a b;touch PWNED.gguf")
    found = arguments(way(PART, 49, 2, ("blk.2.ffn_up_exps",)), Request(path, 4096, 8, 1))
    assert shlex.split(command(found)) == ["llama-server", *found]


def ollama(model, taken, whole, request=REQUEST):
    return ollama_of(model, Choice(taken, whole, (taken,), (), ()), request)


def test_the_modelfile_has_whole_layers_and_says_what_is_lost(made, read):
    found = ollama(read(made.qwen3moe()), way(EXPERTS, 49, 20), way(LAYERS, 12, token_s=0.25))
    assert found.modelfile == "FROM /models/m.gguf\nPARAMETER num_ctx 16384\nPARAMETER num_gpu 12\nPARAMETER num_thread 8\n"
    assert "no parameter for --n-cpu-moe" in found.notes[0]
    assert "2.50 times" in found.notes[0]


def test_the_caches_type_is_the_servers(made, read):
    found = ollama(read(made.llama()), way(LAYERS, 3, cache=Q8), way(LAYERS, 3, cache=Q8))
    assert dict(found.environment) == {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_KV_CACHE_TYPE": "q8_0"}


@pytest.mark.parametrize("name", ["a\nPARAMETER num_gpu 99.gguf", 'a".gguf', "a\x1b[2J.gguf"])
def test_a_path_that_would_say_something_else_is_refused(made, read, name):
    model = read(made.llama())
    with pytest.raises(OverflowmlError, match="rename the file"):
        ollama(model, way(LAYERS, 3), way(LAYERS, 3), Request(Path(name), 4096, 8, 1))
