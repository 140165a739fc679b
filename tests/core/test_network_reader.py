"""A network survives its JSON, and nothing else is taken for one."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.facts import Block, Component, Experts, Linear, Network
from overflowml_core.network_reader import network_from_json, network_to_json
from overflowml_core.work import WORK_KINDS, BlockWork, PassProfile, Variant, Work

NAME = st.text(max_size=8)
COUNT = st.integers(0, 2**62)
WORK = st.builds(Work, st.sampled_from(WORK_KINDS), NAME, COUNT, COUNT, COUNT, COUNT, NAME)
WORKS = st.lists(WORK, max_size=3).map(tuple)
BLOCK_WORK = st.builds(BlockWork, WORKS, COUNT, COUNT)
PROFILE = st.builds(PassProfile, NAME, COUNT, COUNT, st.lists(BLOCK_WORK, max_size=3).map(tuple), WORKS, COUNT, NAME, NAME)
DTYPES = st.lists(st.tuples(NAME, COUNT), max_size=2).map(tuple)
LINEARS = st.lists(st.builds(Linear, COUNT, COUNT, NAME, COUNT), max_size=2).map(tuple)
EXPERTS = st.none() | st.builds(Experts, COUNT, COUNT, COUNT, COUNT, st.booleans(), matrices=LINEARS)
BLOCK = st.builds(Block, NAME, COUNT, COUNT, COUNT, DTYPES, st.none() | NAME, st.booleans(), COUNT, EXPERTS)
PROFILES = st.lists(PROFILE, max_size=2).map(tuple)
COMPONENT = st.builds(
    Component,
    name=NAME,
    class_name=NAME,
    blocks=st.lists(BLOCK, max_size=3).map(tuple),
    resident_bytes=COUNT,
    resident_weight_count=COUNT,
    bytes_by_dtype=DTYPES,
    phase=NAME,
    passes=COUNT,
    activation_bytes=COUNT,
    activation_source=NAME,
    fingerprint=NAME,
    profiles=PROFILES,
    variants=st.lists(st.builds(Variant, NAME, st.booleans(), PROFILES), max_size=2).map(tuple),
)
NETWORK = st.builds(Network, st.lists(COMPONENT, max_size=2).map(tuple), NAME, NAME, NAME)


@settings(max_examples=60, deadline=None)
@given(NETWORK)
def test_round_trip(network):
    assert network_from_json(network_to_json(network)) == network


def test_equal_works_are_written_once():
    work = BlockWork((Work("matmul", "BF16", 1, 2, 3, 4, "signature"),), 5)
    blocks = tuple(Block(f"layers.{i}", 1, 2, 512) for i in range(500))
    component = Component("model", "Model", blocks, 0, 0, (), "model", profiles=(PassProfile("token", 1, 0, (work,) * 500),))
    assert network_to_json(Network((component,), "", "", "")).count("signature") == 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_no_network(text):
    assert network_from_json(text) is None


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | NAME, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@settings(max_examples=200, deadline=None)
@given(NETWORK, st.data())
def test_a_changed_document_is_a_network_or_none(network, data):
    document = json.loads(network_to_json(network))
    place = document
    while isinstance(place, (list, dict)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if data.draw(st.booleans()) or not isinstance(place[key], (list, dict)):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    assert isinstance(network_from_json(json.dumps(document)), (Network, type(None)))
