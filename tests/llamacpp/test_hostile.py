"""Whatever stands in a header, the answer is a choice within the budget or one line of what is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
from pathlib import Path

import pytest

from overflowml_core.errors import OverflowmlError
from overflowml_llamacpp.choice import choose
from overflowml_llamacpp.model import read_model

SEEDS = 250


def test_malformed_headers_are_refused_or_planned(tmp_path, card):
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("fuzz_gguf", Path(__file__).parents[1] / "inspect" / "fuzz_gguf.py")
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("fuzz_gguf", fuzz)
    spec.loader.exec_module(fuzz)
    path, setting, planned = tmp_path / "model.gguf", card(10**8), 0
    for seed in range(SEEDS):
        path.write_bytes(fuzz.make_input(random.Random(seed)))
        with contextlib.suppress(OverflowmlError):  # whatever else is raised fails the test
            way = choose(read_model(path), setting, 4096, ("f16", "q8_0")).way
            assert way.memory.device_bytes <= 10**8
            planned += 1
    assert 0 < planned < SEEDS
