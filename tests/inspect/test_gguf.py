"""GGUF headers are read exactly or refused with what is wrong and where; nothing is allocated for what a header merely claims."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest

from overflowml_core.errors import BadCheckpoint
from overflowml_core.inspect.ggml_types import GGML_TYPES
from overflowml_core.inspect.gguf import open_gguf, read_gguf_header
from overflowml_core.inspect.gguf_cursor import LongValue

_spec = importlib.util.spec_from_file_location("gguf_files", Path(__file__).with_name("gguf_files.py"))
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
gguf_file = files.gguf_file


def write(path, raw):
    path.write_bytes(raw)
    return path


def refused(path, raw, words):
    with pytest.raises(BadCheckpoint, match=words) as caught:
        read_gguf_header(write(path, raw))
    assert "\n" not in str(caught.value)
    assert len(caught.value.problem) < 400


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_every_type_has_the_size_that_ggml_gives_it():
    gguf = pytest.importorskip("gguf")
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {number: (kind.name, kind.block_count, kind.block_bytes) for number, kind in GGML_TYPES.items()}
    assert {number: ours.get(number) for number in theirs} == theirs


@pytest.mark.parametrize("type_name", sorted(files.NUMBER_OF))
def test_bytes_of_every_type_are_exact(path, type_name):
    header = read_gguf_header(write(path, gguf_file({}, [("a", type_name, (3, 512)), ("b", "F32", (5,)), ("c", type_name, (2, 2, 256))])))
    assert [t.nbytes for t in header.tensors] == [files.tensor_bytes(type_name, (3, 512)), 20, files.tensor_bytes(type_name, (2, 2, 256))]
    assert header.tensors[0].shape == (3, 512)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_either_byte_order_reads_the_same(path, version, big_endian):
    metadata = {
        "a": (0, 200),
        "b": (1, -3),
        "c": (2, 60_000),
        "d": (3, -300),
        "e": (5, -70_000),
        "f": (6, 0.5),
        "g": (7, True),
        "h": "text é",
        "i": (10, 2**63),
        "j": (11, -(2**62)),
        "k": (12, 0.25),
        "l": (files.ARRAY, (4, [1, 2, 3])),
        "m": (files.ARRAY, (8, ["x", "yy"])),
        "n": (files.ARRAY, (7, [0, 1])),
    }
    header = read_gguf_header(write(path, gguf_file(metadata, [("w", "Q4_K", (2, 256))], version, big_endian)))
    assert (header.version, header.big_endian) == (version, big_endian)
    expected = {name: value[1] if isinstance(value, tuple) else value for name, value in metadata.items()}
    expected |= {"l": (1, 2, 3), "m": LongValue("array", 2), "n": (False, True)}
    assert dict(header.metadata) == expected
    assert header.metadata["g"] is True
    assert [t.nbytes for t in header.tensors] == [288]


def test_a_real_reader_finds_the_same_tensors(path):
    gguf = pytest.importorskip("gguf")
    metadata, tensors = files.llama(type_name="Q8_0")
    write(path, gguf_file(metadata | {"general.alignment": 64}, tensors, alignment=64))
    theirs = gguf.GGUFReader(path).tensors
    ours = read_gguf_header(path).tensors
    assert {(t.name, t.data_offset, t.n_bytes, tuple(int(n) for n in reversed(t.shape))) for t in theirs} == {
        (t.name, t.offset_bytes, t.nbytes, t.shape) for t in ours
    }


def test_a_file_cut_anywhere_is_refused(path):
    metadata, tensors = files.llama(layers=1, width=32, vocabulary=32)
    metadata["tokenizer.ggml.tokens"] = ["a", "bb", "ccc"]
    tensors = sorted(tensors, key=lambda tensor: "norm" not in tensor[0])  # ends with a matrix, so that no padding is left
    raw = gguf_file(metadata, tensors)
    assert len(raw) > 5000
    read_gguf_header(write(path, raw))
    for length in [*range(0, 1500), *range(1500, len(raw), 61), len(raw) - 1]:
        refused(path, raw[:length], "cut short|starts with|claims")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "starts with"),
        (b"GGUF", "cut short"),
        (b"FUGG" + bytes(30), "backwards"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims 9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 10**18), "claims 1000000000000000000 metadata keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 10**18) + bytes(20), "claims 1000000000000000000 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<I", 13) + bytes(9), "unknown type 13"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IQ", 8, 10**18) + bytes(9), "takes 1000000000000000000"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 4, 2**62), "cut short"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 8, 2**62),
            "claims 4611686018427387904 elements",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text(b"\xff\xfe") + bytes(9), "not UTF-8"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
    ],
)
def test_absurd_headers_are_named(path, raw, words):
    refused(path, raw, words)


def test_arrays_nested_without_end_are_refused(path):
    nested = struct.pack("<I", files.ARRAY) + b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 4, 0)
    refused(path, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + nested, "nested")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.replace(struct.pack("<I", 2) + struct.pack("<QQ", 64, 3), struct.pack("<I", 5) + struct.pack("<QQ", 64, 3)),
            "5 dimensions",
        ),
        (lambda t: t.replace(struct.pack("<QQ", 64, 3), struct.pack("<QQ", 65, 3)), "do not divide"),
        (lambda t: t.replace(struct.pack("<QQ", 64, 3), struct.pack("<QQ", 2**40, 2**40)), r"more than 2\*\*59"),
        (lambda t: t.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 38, 0)), "'w' is of ggml type 38"),
        (lambda t: t.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, 7)), "multiple of 32"),
        (lambda t: t.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, 2**63)), "cut short"),
        (lambda t: t.replace(struct.pack("<IQ", 8, 224), struct.pack("<IQ", 8, 32)), "overlap"),
        (lambda t: t.replace(files.text("v"), files.text("w")), "'w' stands twice"),
    ],
)
def test_tensors_that_cannot_be_are_named(path, change, words):
    raw = gguf_file({}, [("w", "Q8_0", (3, 64)), ("v", "Q8_0", (3, 64))])
    changed = change(raw)
    assert changed != raw
    refused(path, changed, words)


@pytest.mark.parametrize("alignment", [0, 3, 2**21, "32", -1.0, (5, 32)])
def test_an_alignment_that_is_no_power_of_two_is_refused(path, alignment):
    refused(path, gguf_file({"general.alignment": alignment}, [("w", "F32", (3,))]), "general.alignment")


def test_a_key_that_stands_twice_is_refused(path):
    raw = gguf_file({"ka": 1, "kb": 2}).replace(b"kb", b"ka")
    refused(path, raw, "'ka' stands twice")


def test_long_values_are_stepped_over(path):
    metadata = {"tokens": (files.ARRAY, (8, ["token"] * 50_000)), "scores": (files.ARRAY, (6, [0.0] * 200_000)), "template": "x" * 200_000}
    write(path, gguf_file(metadata, [("w", "F32", (3,))]))
    tracemalloc.start()
    header = read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dict(header.metadata) == {
        "tokens": LongValue("array", 50_000),
        "scores": LongValue("array", 200_000),
        "template": LongValue("text", 200_000),
    }
    assert peak < 2 * 2**20


@pytest.mark.skipif(sys.platform == "win32", reason="truncate allocates the whole file there")
def test_a_terabyte_of_nothing_is_refused_at_once(path):
    # Zeros are empty texts: 2**37 of them fit into the file, and each is valid.
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("k") + struct.pack("<IIQ", 9, 8, 2**36)
    write(path, head)
    os.truncate(path, 2**40)
    tracemalloc.start()
    with pytest.raises(BadCheckpoint, match="more than 2000000 texts"):
        read_gguf_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def split(folder, count=3, **wrong):
    tensors = [[(f"w{part}.{i}", "F32", (8,)) for i in range(2)] for part in range(count)]
    paths = []
    for part in range(count):
        metadata = {"split.no": (files.UINT16, part), "split.count": (files.UINT16, count), "split.tensors.count": (files.INT32, 2 * count)}
        if part == 0:
            metadata["general.architecture"] = "llama"
        metadata |= wrong.get(f"part{part}", {})
        paths.append(write(folder / f"m-{part + 1:05d}-of-{count:05d}.gguf", gguf_file(metadata, tensors[part])))
    return paths


def test_any_part_of_a_split_model_leads_to_all_of_it(tmp_path):
    paths = split(tmp_path)
    for path in paths:
        model = open_gguf(path)
        assert model.files == tuple(paths)
        assert [tensor.name for tensor in model.tensors] == ["w0.0", "w0.1", "w1.0", "w1.1", "w2.0", "w2.1"]
        assert model.metadata["general.architecture"] == "llama"


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(BadCheckpoint, match=r"m-00002-of-00003\.gguf: missing"):
        open_gguf(paths[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"part1": {"split.no": (files.UINT16, 2)}}, "header part 3 of 3"),
        ({"part2": {"split.count": (files.UINT16, 4)}}, "header part 3 of 4"),
        ({"part0": {"split.tensors.count": (files.INT32, 7)}}, "hold 7 tensors, they hold 6"),
    ],
)
def test_parts_of_different_models_are_refused(tmp_path, wrong, words):
    with pytest.raises(BadCheckpoint, match=words):
        open_gguf(split(tmp_path, **wrong)[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths = split(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"w1.0", b"w0.0"))
    with pytest.raises(BadCheckpoint, match=r"'w0\.0' is in m-00001-of-00003\.gguf too"):
        open_gguf(paths[2])


def test_a_renamed_part_is_named(tmp_path):
    path = split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadCheckpoint, match="a part of 3"):
        open_gguf(path)


@pytest.mark.parametrize("name", ["missing.gguf", "folder.gguf", "nul\0.gguf"])
def test_what_is_no_file_is_named(tmp_path, name):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(BadCheckpoint):
        open_gguf(tmp_path / name)
