"""Any bytes give BadCheckpoint or what the real library reads too; the long run is fuzz.py."""

import importlib.util
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = _load("fuzz_headers")

few = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fuzz.safetensors"


@few
@given(raw=st.binary(max_size=300))
def test_arbitrary_bytes(path, raw):
    fuzz.check(path, raw)


@few
@given(header=st.binary(max_size=300), data=st.binary(max_size=20))
def test_arbitrary_header_of_the_right_length(path, header, data):
    fuzz.check(path, struct.pack("<Q", len(header) + 1) + b"{" + header + data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "b"]), inner, max_size=5)
    ),
    max_leaves=12,
)
almost_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*fuzz.DTYPE_BITS, "f32"]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 40) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


@few
@given(
    document=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), almost_entries | json_values, max_size=3),
    data=st.binary(max_size=40),
)
def test_arbitrary_json(path, document, data):
    header = fuzz.json.dumps(document).encode()
    fuzz.check(path, struct.pack("<Q", len(header)) + header + data)


def test_mutated_headers(path):
    rng = random.Random(20)
    tracemalloc.start()
    try:
        outcomes = [fuzz.check(path, fuzz.make_input(rng)) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[1] < fuzz.LARGEST_ALLOCATION_BYTES
    finally:
        tracemalloc.stop()
    # the mutations are of use only as long as they reach both sides
    assert min(outcomes.count("accepted"), outcomes.count("refused")) > 100


@few
@given(seed=st.integers(0, 2**32))
def test_well_formed_headers_are_accepted(path, seed):
    header, data = fuzz.valid_file(random.Random(seed))
    assert fuzz.check(path, struct.pack("<Q", len(header)) + header + data) == "accepted"


@pytest.fixture
def fuzz_gguf():
    pytest.importorskip("gguf")
    return _load("fuzz_gguf")


@few
@given(raw=st.binary(max_size=300), magic=st.sampled_from((b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\0\0\0\2")))
def test_arbitrary_bytes_as_gguf(fuzz_gguf, path, raw, magic):
    fuzz_gguf.check(path, magic + raw)


def test_mutated_gguf_headers(fuzz_gguf, path):
    rng = random.Random(21)
    tracemalloc.start()
    try:
        outcomes = [fuzz_gguf.check(path, fuzz_gguf.make_input(rng)) for _ in range(150)]
        assert tracemalloc.get_traced_memory()[1] < fuzz.LARGEST_ALLOCATION_BYTES
    finally:
        tracemalloc.stop()
    assert min(outcomes.count("accepted"), outcomes.count("refused")) > 20


@few
@given(seed=st.integers(0, 2**32))
def test_well_formed_gguf_headers_are_accepted(fuzz_gguf, path, seed):
    assert fuzz_gguf.check(path, fuzz_gguf.valid_file(random.Random(seed))) == "accepted"
