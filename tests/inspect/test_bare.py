"""A size alone, or four numbers of a mixture of experts, give a network of exactly that size and of the right order of work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.bare import bare_network, moe_network, source_size
from overflowml_core.errors import BadLimits, BadSize
from overflowml_core.facts import Workload


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("40", 40 * 10**9),
        ("40GB", 40 * 10**9),
        ("40 GiB", 40 * 2**30),
        (" 0.5 ", 5 * 10**8),
        ("40.", 40 * 10**9),
        (".5", 5 * 10**8),
        (40, 40 * 10**9),
        (1.5, 1_500_000_000),
        ("512MiB", 2**29),
    ],
)
def test_sizes_are_gigabytes_unless_they_say_otherwise(text, nbytes):
    assert source_size(text) == nbytes


NO_SIZES = [
    *("forty", "nan", "inf", "-3", "0", "", " ", "40 XB", "1e3", "4.5.6", "4O", "٤٠", "9" * 400, "0.0000001", "40GB\0", "40\n\nGB GB"),
    *(float("nan"), float("inf"), -3, 0, True, None, b"40", []),
]


@pytest.mark.parametrize("text", [*NO_SIZES, pytest.param(10**400, id="10**400"), pytest.param(10**5000, id="10**5000")])
def test_what_is_no_size_is_refused_with_the_way_out(text):
    with pytest.raises(BadSize) as caught:
        source_size(text)
    assert "'8GB'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def the(network):
    assert len(network.components) == 1
    return network.components[0]


def test_flux_by_its_size_alone():
    found = the(bare_network(23_802_816_640, Workload()))  # 22.168 GiB
    (denoise,) = found.profiles
    assert denoise.count == 28
    assert len(found.blocks) == pytest.approx(57, rel=0.1)
    assert denoise.flop == pytest.approx(59.5e12 + 14.9e12, rel=0.1)  # traced: products, and attention
    assert denoise.activation_bytes == pytest.approx(468 * 2**20, rel=0.1)


def test_llama_70b_by_its_size_alone():
    found = the(bare_network(141_107_412_992, Workload(prompt_tokens=2048)))
    prefill, token = found.profiles
    assert len(found.blocks) == pytest.approx(80, rel=0.1)
    assert prefill.flop == pytest.approx(280.4e12 + 11e12, rel=0.1)
    assert prefill.activation_bytes == pytest.approx(1173 * 2**20, rel=0.1)
    assert prefill.cache_bytes / 2048 == pytest.approx(327_680, rel=0.1)
    assert sum(work.weight_bytes for block in token.blocks for work in block.works) == sum(block.stored_bytes for block in found.blocks)


sizes = st.integers(10**6, 2**60) | st.integers(10**9, 10**12)
workloads = st.builds(
    Workload,
    height=st.none() | st.integers(1, 4096),
    frames=st.none() | st.integers(1, 200),
    batch=st.integers(1, 8),
    prompt_tokens=st.none() | st.integers(1, 10**6),
    new_tokens=st.none() | st.integers(1, 10**4),
)


@settings(max_examples=200, deadline=None)
@given(sizes, workloads)
def test_every_byte_is_counted_once(nbytes, workload):
    network = bare_network(nbytes, workload)
    found = the(network)
    assert network.weight_bytes == nbytes
    inside = sum(block.stored_bytes for block in found.blocks)
    assert nbytes - 511 <= inside + found.resident_bytes <= nbytes + 511 + inside  # fixed weights are aligned
    assert inside <= nbytes
    assert found.weight_count == nbytes // 2
    for profile in found.profiles:
        assert profile.source == "analytic"
        assert "a bare size" in profile.note
        assert len(profile.blocks) == len(found.blocks)
        assert 0 <= profile.cache_bytes <= profile.activation_bytes
        assert profile.flop > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(10**9, 10**13), st.integers(2, 10), workloads)
def test_a_larger_model_computes_more(nbytes, times, workload):
    small, large = (the(bare_network(size, workload)).profiles[0].flop for size in (nbytes, times * nbytes))
    assert large > small


def test_blocks_share_their_work():
    for workload in (Workload(), Workload(new_tokens=2)):
        for profile in the(bare_network(10**12, workload)).profiles:
            assert len({id(block) for block in profile.blocks}) == 1


def test_the_old_tool_s_example():
    found = the(moe_network(120, 12, 128, 8, 120 * 10**9))
    bank = found.blocks[0].experts
    assert (bank.count, bank.per_token) == (128, 8)
    assert found.weight_bytes == 120 * 10**9
    assert found.weight_count == 120 * 10**9
    routed = len(found.blocks) * bank.count * bank.nbytes
    assert routed == pytest.approx(115.2e9, rel=1e-3)  # (120 - 12) / (1 - 8/128)
    active = found.weight_bytes - routed + routed * 8 / 128
    assert active == pytest.approx(12e9, rel=1e-3)
    prefill, token = found.profiles
    assert token.flop == pytest.approx(2 * 12e9, rel=0.1)
    assert "4.8 billion shared" in prefill.note


def test_without_a_size_a_weight_takes_two_bytes():
    assert moe_network(30.5, 3.3, 128, 8).weight_bytes == 61 * 10**9


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((120, 130, 128, 8), "130 billion active weights are more than 120"),
        ((120, 12, 8, 9), "cannot use 9 of 8"),
        ((120, 12, 8, 8), "dense model"),
        ((120, 1, 128, 64), "at least 60 of 120 billion"),
        ((float("nan"), 1, 2, 1), "nan is no number"),
        ((float("inf"), 1, 2, 1), "inf is no number"),
        ((-1, -2, 2, 1), "-1 is no number"),
        ((120, 12, 0, 0), "0 is no number of experts"),
        ((120, 12, 2.5, 1), "2.5 is no number of experts"),
        ((True, 1, 2, 1), "True is no number"),
        (("120", 12, 128, 8), "'120' is no number"),
        pytest.param((10**5000, 12, 128, 8), "more than 18 digits", id="huge"),
        ((0.0001, 0.00005, 65536, 1), "leave none for an expert"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_with_their_numbers(numbers, words):
    with pytest.raises(BadLimits) as caught:
        moe_network(*numbers)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nbytes", [1, 10**18])
def test_a_size_that_no_weight_can_have_is_refused(nbytes):
    with pytest.raises(BadLimits, match="bytes a weight"):
        moe_network(120, 12, 128, 8, nbytes)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 3000), st.floats(0.01, 1), st.integers(2, 512), st.integers(1, 512), st.sampled_from((0.5, 1, 2)))
def test_every_mixture_is_whole_or_refused(total, share, experts, per_token, element):
    try:
        network = moe_network(total, total * share, experts, per_token, round(total * 1e9 * element))
    except BadLimits:
        return
    found = the(network)
    assert network.weight_bytes == round(total * 1e9 * element)
    for block in found.blocks[:1]:
        assert block.experts.count * block.experts.nbytes <= block.stored_bytes
        assert block.experts.nbytes > 0
    assert sum(block.weight_count for block in found.blocks) <= found.weight_count
    for profile in found.profiles:
        assert all(work.flop >= 0 and work.traffic_bytes >= work.weight_bytes >= 0 for work in profile.blocks[0].works)
