"""Caches of transformers under a call that is made again: joined ones are put back, those written in place forbid it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from overflowml_core.runtime.elastic_state import CallState


def config() -> LlamaConfig:
    return LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=32)


def fill(cache: DynamicCache | StaticCache, layers: int) -> None:
    for layer in range(layers):
        cache.update(torch.full((1, 2, 1, 8), float(layer)), torch.ones(1, 2, 1, 8), layer, {"cache_position": torch.tensor([0])})


def test_a_dynamic_cache_that_was_appended_to_in_some_layers_is_put_back() -> None:
    for cache in (DynamicCache(), DynamicCache(config=config())):
        fill(cache, 3)
        lengths, keys = [cache.get_seq_length(layer) for layer in range(3)], [layer.keys for layer in cache.layers]
        state = CallState(nn.Linear(2, 2), [cache], [])
        fill(cache, 2)  # the third layer ran out of memory
        assert state.put_back() == ""
        assert [cache.get_seq_length(layer) for layer in range(3)] == lengths
        assert all(layer.keys is before for layer, before in zip(cache.layers, keys, strict=True))


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
