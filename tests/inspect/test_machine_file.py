"""Machines as JSON: nothing is lost on the way, and nothing that no machine can be gets through."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import OverflowmlError
from overflowml_core.inspect.datasheet import UnknownAccelerator
from overflowml_core.inspect.machine import assumed_cpu_rates, detect_machine
from overflowml_core.inspect.machine_file import (
    FILE_LIMIT_BYTES,
    BadMachine,
    machine_document,
    machine_of_document,
    machine_of_json,
    machine_to_json,
    read_machine,
)
from overflowml_core.inspect.named import named_machine
from overflowml_core.machine import Accelerator, ComputeRate, HostMemory, Machine, Rates

GIB = 2**30
HOST = {"total_bytes": 32 * GIB, "core_count": 8}

sizes = st.integers(0, 2**60)
words = st.text(max_size=40)
figures = st.floats(0, 1e21)
compute_rates = st.builds(ComputeRate, kind=words, dtype=words, flop_per_s=figures)
rates = st.builds(
    Rates,
    *[figures] * 3,
    source=st.sampled_from(["measured", "datasheet", "assumed"]),
    pageable_h2d_bytes_per_s=figures,
    pageable_d2h_bytes_per_s=figures,
    memory_bytes_per_s=figures,
    compute=st.lists(compute_rates, max_size=4).map(tuple),
    launch_s=st.floats(0, 1e6),
    op_seconds=st.lists(st.tuples(words, st.floats(0, 1e6)), max_size=4).map(tuple),
)


@st.composite
def accelerators(draw):
    total = draw(st.integers(1, 2**60))
    return Accelerator(
        kind=draw(st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)),
        name=draw(words),
        index=draw(st.integers(0, 1000)),
        total_bytes=total,
        free_bytes=draw(st.integers(0, total)),
        unified=draw(st.booleans()),
        backend=draw(words),
        rates=draw(st.none() | rates),
        features=draw(st.frozensets(words, max_size=4)),
        capability=draw(words),
        driver=draw(words),
        link=draw(words),
    )


@st.composite
def hosts(draw):
    total = draw(st.integers(1, 2**60))
    return HostMemory(
        total_bytes=total,
        available_bytes=draw(st.integers(0, total)),
        pinnable_bytes=draw(st.integers(0, total)),
        core_count=draw(st.integers(1, 2**16)),
        swap_bytes=draw(sizes),
        isa=draw(st.frozensets(words, max_size=4)),
        cpu_name=draw(words),
    )


machines = st.builds(
    Machine,
    st.lists(accelerators(), max_size=3).map(tuple),
    hosts(),
    rates,
    sizes,
    environment=st.frozensets(words, max_size=4),
    cpu_rates=st.none() | rates,
    named=st.booleans(),
)


@settings(max_examples=60)
@given(machines)
def test_a_machine_survives_its_file(machine):
    assert machine_of_json(machine_to_json(machine)) == machine


def test_what_was_detected_and_what_was_named_survive(tmp_path):
    for machine in (detect_machine([], tmp_path), named_machine("RTX 4090, M4 Max 128GB", ram_bytes=64 * GIB)):
        (tmp_path / "machine.json").write_text(machine_to_json(machine))
        assert read_machine(tmp_path / "machine.json") == machine


def test_machine_inside_a_larger_answer_is_found(tmp_path):
    machine = detect_machine([], tmp_path)
    assert machine_of_json(json.dumps({"overflowml": "1.0", "machine": machine_document(machine)})) == machine


def test_a_few_lines_by_hand_are_enough():
    machine = machine_of_json('{"accelerators": ["RTX 4090", "3060"], "host": {"total_bytes": "64GB", "core_count": 16}}')
    assert [a.total_bytes for a in machine.accelerators] == [24 * GIB, 12 * GIB]
    assert (machine.named, machine.host.available_bytes) == (True, 64 * 10**9)
    assert machine.rates.source == "datasheet"
    assert machine.rates.flop_per_s("matmul", "BF16") > 1e14
    assert machine.cpu_rates.source == "assumed"


def test_card_that_is_described_and_known_gets_its_datasheets_rates():
    card = {"kind": "cuda", "name": "NVIDIA GeForce RTX 4090", "total_bytes": "24GiB", "link": "PCIe 3.0 x4"}
    machine = machine_of_document({"accelerators": [card], "host": HOST})
    assert machine.rates.h2d_bytes_per_s == pytest.approx(3e9)
    assert machine.accelerators[0].free_bytes == 24 * GIB


def test_machine_without_accelerator_computes_on_its_cpu():
    machine = machine_of_document({"accelerators": [], "host": HOST})
    assert machine.rates == assumed_cpu_rates(machine.host)
    assert machine.cpu_rates is None


def test_nothing_free_is_a_machine():
    card = {"kind": "cuda", "name": "x", "total_bytes": GIB, "free_bytes": 0}
    machine = machine_of_document({"accelerators": [card], "host": {**HOST, "available_bytes": 0}})
    assert (machine.compute.free_bytes, machine.host.available_bytes, machine.host.pinnable_bytes) == (0, 0, 0)


def card(**fields):
    return {"accelerators": [{"kind": "cuda", "name": "x", "total_bytes": GIB, **fields}], "host": HOST}


def with_rates(**fields):
    return {"accelerators": [], "host": HOST, "rates": fields}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "machine=a list of 0: it is not a JSON object"),
        ({}, "machine.host is missing"),
        ({"host": HOST}, "machine.accelerators is missing"),
        ({"accelerators": [], "host": {}}, "host.total_bytes is missing"),
        ({"accelerators": [], "host": {"total_bytes": GIB}}, "host.core_count is missing"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": 0}}, "host.total_bytes=0"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": -5}}, "host.total_bytes=-5"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": 2**61}}, "host.total_bytes="),
        ({"accelerators": [], "host": {**HOST, "total_bytes": 10**400}}, "host.total_bytes=a number of more than 30 digits"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": 1.5}}, "host.total_bytes=1.5"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": True}}, "host.total_bytes=True"),
        ({"accelerators": [], "host": {**HOST, "total_bytes": "forty"}}, "host.total_bytes='forty'"),
        ({"accelerators": [], "host": {**HOST, "available_bytes": 33 * GIB}}, "host.available_bytes=.*more than the total"),
        ({"accelerators": [], "host": {**HOST, "core_count": 0}}, "host.core_count=0"),
        ({"accelerators": [], "host": {**HOST, "isa": "avx2"}}, "host.isa='avx2'"),
        ({"accelerators": [], "host": {**HOST, "ram": 1}}, "host has no field 'ram'"),
        ({"accelerators": [], "host": HOST, "gpu": 1}, "machine has no field 'gpu'"),
        ({"accelerators": [], "host": HOST, "schema": 9}, "schema=9: this version reads 1"),
        ({"accelerators": ["x"] * 65, "host": HOST}, "accelerators=a list of 65"),
        ({"accelerators": [7], "host": HOST}, r"accelerators\[0\]=7"),
        ({"accelerators": [""], "host": HOST}, r"accelerators\[0\]=''"),
        ({"accelerators": ["2x RTX 3060"], "host": HOST}, r"accelerators\[0\]='2x RTX 3060'"),
        (card(total_bytes=0), "total_bytes=0"),
        (card(free_bytes=GIB + 1), "free_bytes=.*more than the total"),
        (card(free_bytes=-1), "free_bytes=-1"),
        (card(kind="CUDA 1"), "kind='CUDA 1'"),
        (card(kind=""), "kind=''"),
        (card(name="x" * 500), "name='xxx"),
        (card(unified=1), "unified=1"),
        (card(features=[1]), "features=1"),
        (with_rates(h2d_bytes_per_s=math.nan), "rates.h2d_bytes_per_s=nan"),
        (with_rates(h2d_bytes_per_s=math.inf), "rates.h2d_bytes_per_s=inf"),
        (with_rates(disk_bytes_per_s=-1), "rates.disk_bytes_per_s=-1"),
        (with_rates(disk_bytes_per_s=10**400), "rates.disk_bytes_per_s=a number"),
        (with_rates(disk_bytes_per_s="fast"), "rates.disk_bytes_per_s='fast'"),
        (with_rates(source="guessed"), "rates.source='guessed': it is one of measured, datasheet, assumed"),
        (with_rates(launch_s=1e9), "rates.launch_s="),
        (with_rates(compute=[{"kind": "matmul", "dtype": "BF16"}]), r"rates.compute\[0\].flop_per_s is missing"),
        (with_rates(op_seconds=[["a"]]), r"rates.op_seconds\[0\]="),
        (with_rates(op_seconds=[["a", -1]]), r"rates.op_seconds\[0\]=-1"),
    ],
)
def test_errors_name_the_field_and_its_value(document, message):
    with pytest.raises(BadMachine, match=message) as caught:
        machine_of_document(document)
    assert len(str(caught.value)) < 400


def test_unknown_accelerator_in_a_file_suggests_others():
    with pytest.raises(UnknownAccelerator, match="RTX 4090"):
        machine_of_document({"accelerators": ["RTX 4091"], "host": HOST})


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, '{"host": NaN', "null", "9" * 5000, b"\xff\xfe"])
def test_text_that_is_no_machine(text):
    with pytest.raises(BadMachine):
        machine_of_json(text)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["host", "accelerators", "rates", "total_bytes", "core_count", "kind", "name", "compute"]), x)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_machine_or_an_error(document):
    with contextlib.suppress(OverflowmlError):
        machine_of_document(document)


def test_every_cut_of_a_file_is_an_error(tmp_path):
    text = machine_to_json(detect_machine([], tmp_path))
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(BadMachine):
            machine_of_json(text[:end])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadMachine, match="cannot be read"):
        read_machine(tmp_path / "none.json")
    with pytest.raises(BadMachine, match="cannot be read"):
        read_machine(tmp_path)
    with pytest.raises(BadMachine, match="cannot be read"):
        read_machine("a\0b")
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(BadMachine, match=f"longer than {FILE_LIMIT_BYTES}"):
        read_machine(large)
