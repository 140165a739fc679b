"""What reaches a managed model past its own methods: moves of its parts, copies, pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from overflowml_core import session
from overflowml_core.errors import Managed
from tests.hosts.check import smallest


@pytest.fixture
def managed(saved: Callable[..., Path]):
    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, overflow=smallest(folder))
    yield model
    session.release(model)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.model.half(),
        lambda m: m.model.layers[0].to(torch.float64),
        lambda m: m.model.layers[0].mlp.down_proj.to("meta"),
        lambda m: m.lm_head.double(),
        lambda m: torch.nn.Module.bfloat16(m),
    ],
)
def test_a_part_is_not_moved(managed, move):
    before = {name: (tensor.dtype, tensor.device) for name, tensor in managed.state_dict().items()}
    with pytest.raises(Managed, match=r"a move or cast of model.*overflowml\.release"):
        move(managed)
    assert {name: (tensor.dtype, tensor.device) for name, tensor in managed.state_dict().items()} == before


def test_a_move_to_where_the_part_is_already_changes_nothing(managed):
    """Hosts make sure of a place before they use it; PEFT does so of the model that it wraps."""
    before = dict(managed.named_parameters())
    assert managed.model.float().to("cpu") is managed.model
    assert all(parameter is before[name] for name, parameter in managed.named_parameters())


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_a_copy_says_what_stands_in_its_way(managed, make):
    with pytest.raises(Managed, match="a copy or pickle of model"):
        make(managed)


def test_parts_move_again_after_release(managed):
    session.release(managed)
    assert managed.model.layers[0].to(torch.float64).mlp.down_proj.weight.dtype is torch.float64
    assert all("_apply" not in vars(part) for part in managed.modules())
    copy.deepcopy(managed)
