"""Sizes are read as people write them, and nothing else is."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import BadLimits, BadSize
from overflowml_core.facts import Limits, Workload
from overflowml_core.units import ceil_size, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (".5GB", 5 * 10**8),
        ("100B", 100),
        (2**30, 2**30),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "size",
    ["lots", "-1", "0", "", " ", "8", "GB", "8 G B", "8GB8", "1e9GB", "0GB", "-8GB", "inf", "nan GB", "\uff18GB", "9" * 30 + "GB",
     "2000000TB",
     -1, 0, 8, True, False, 1.5, None, b"8GB", [], 2**61],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_its_value(size):
    with pytest.raises(BadSize) as caught:
        parse_bytes(size, "overflow")
    assert str(caught.value).startswith(f"overflow={size!r}: ")
    assert "\n" not in str(caught.value)


@given(st.text() | st.integers() | st.floats() | st.binary())
def test_anything_is_a_size_or_a_bad_size(value):
    with contextlib.suppress(BadSize):
        assert 0 < parse_bytes(value) <= 2**60


@given(st.integers(1, 2**59))
def test_a_suggested_size_holds_what_it_should(nbytes):
    assert nbytes <= parse_bytes(ceil_size(nbytes)) < nbytes + 10**6


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**30, "5.00 GiB"), (2**41, "2.00 TiB"), (-2048, "-2.0 KiB")]
)
def test_bytes_are_written(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0012, "1.2 ms"), (0.85, "850 ms"), (4.2, "4.2 s"), (185, "3 min 05 s")])
def test_seconds_are_written(seconds, text):
    assert format_seconds(seconds) == text


def test_limits_are_read_from_what_a_user_writes():
    assert Limits.of(True) == Limits()
    assert Limits.of("8GB").device_bytes == 8 * 10**9
    assert Limits.of({"device_memory": "8GB", "reserve": "1GB"}).reserve_bytes == 10**9
    given_limits = Limits(host_memory="32GB")
    assert Limits.of(given_limits) is given_limits
    assert Limits(device_memory="8GB", reserve=0).reserve_bytes == 0


@pytest.mark.parametrize("request_", [False, None, 3.5, [], object(), {"vram": "8GB"}])
def test_what_is_no_request_is_refused(request_):
    with pytest.raises((BadLimits, BadSize)):
        Limits.of(request_)


def test_contradicting_limits_are_refused():
    with pytest.raises(BadLimits, match="reserve"):
        Limits(device_memory="1GB", reserve="2GB")
    with pytest.raises(BadLimits, match="quality"):
        Limits(quality="perfect")
    with pytest.raises(BadLimits, match="allow_disk"):
        Limits(allow_disk="no")


@pytest.mark.parametrize("field", ["height", "width", "frames", "batch", "steps", "prompt_tokens", "new_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "512"])
def test_workloads_count_in_whole_numbers(field, value):
    with pytest.raises(BadLimits, match=field):
        Workload(**{field: value})
