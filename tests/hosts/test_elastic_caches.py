"""Caches of transformers under a call that is made again: joined ones are put back, those written in place forbid it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from overflowml_core.runtime.elastic_state import CallState
from overflowml_transformers.caches import know_caches


@pytest.fixture(autouse=True)
def known() -> None:
    know_caches()


def config() -> LlamaConfig:
    return LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=32)


def fill(cache: DynamicCache | StaticCache, layers: int) -> None:
    for layer in range(layers):
        cache.update(torch.full((1, 2, 1, 8), float(layer)), torch.ones(1, 2, 1, 8), layer, {"cache_position": torch.tensor([0])})


def test_a_dynamic_cache_that_was_appended_to_in_some_layers_is_put_back() -> None:
    for cache in (DynamicCache(), DynamicCache(config=config())):
        fill(cache, 3)
        fill(cache, 3)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        third = cache.layers[2].keys
        state = CallState(nn.Linear(2, 2), [cache], [])
        fill(cache, 2)  # the third layer ran out of memory
        assert state.put_back() == ""
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        assert cache.layers[2].keys is third


def test_what_a_cache_held_is_not_kept_alive() -> None:
    cache = DynamicCache()
    fill(cache, 3)
    former = [weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]
    state = CallState(nn.Linear(2, 2), [cache], [])
    fill(cache, 3)
    assert [one() for one in former] == [None] * 6
    assert state.put_back() == ""
    assert cache.get_seq_length() == 1


def test_a_cache_of_another_kind_whose_keys_are_gone_is_not_gone_over_again() -> None:
    class Sliding(DynamicLayer):
        pass

    cache = DynamicCache()
    fill(cache, 1)
    cache.layers[0].__class__ = Sliding
    state = CallState(nn.Linear(2, 2), [cache], [])
    fill(cache, 1)
    assert "gave way to another tensor" in state.put_back()
    assert cache.get_seq_length() == 2  # nothing was touched


@pytest.mark.parametrize("change", [lambda t: t[..., :0, :], lambda t: torch.cat((t, t), dim=-1), lambda t: t[0], lambda t: None])
def test_a_cache_that_does_not_begin_with_what_it_held_is_not_gone_over_again(change: Callable[[torch.Tensor], object]) -> None:
    cache = DynamicCache()
    fill(cache, 1)
    state = CallState(nn.Linear(2, 2), [cache], [])
    cache.layers[0].keys = change(cache.layers[0].keys.clone())
    assert "gave way to another tensor" in state.put_back()


def test_dicts_and_lists_are_put_back_in_their_order() -> None:
    held = [torch.ones(1), torch.ones(2)]
    values: list[Any] = [{"a": held[0], "b": 1}, OrderedDict(x=held[1], y=2), [held[0], 3]]
    state = CallState(nn.Linear(2, 2), values, [])
    del values[0]["a"]
    values[0]["c"], values[0]["a"] = 3, torch.zeros(1)
    values[1].move_to_end("x")
    values[2][:] = [4]
    assert state.put_back() == ""
    assert list(values[0].items()) == [("a", held[0]), ("b", 1)]
    assert list(values[1].items()) == [("x", held[1]), ("y", 2)]
    assert values[2] == [held[0], 3]


def test_a_dynamic_cache_that_was_empty_is_empty_again() -> None:
    cache = DynamicCache(config=config())
    state = CallState(nn.Linear(2, 2), [cache], [])
    fill(cache, 2)
    assert state.put_back() == ""
    assert cache.get_seq_length() == 0


def test_a_static_cache_that_was_written_to_is_not_gone_over_again() -> None:
    cache = StaticCache(config=config(), max_cache_len=4)
    fill(cache, 3)
    state = CallState(nn.Linear(2, 2), [cache], [])
    fill(cache, 1)
    assert "written to in place" in state.put_back()
