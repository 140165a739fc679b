"""Headers: those of the real library are read as it reads them, every malformation is refused by name."""

import json
import os
import struct
import sys

import pytest

from overflowml_core.errors import BadCheckpoint
from overflowml_core.inspect.safetensors import DTYPE_BITS, LARGEST_HEADER_BYTES, TensorEntry, read_header

safetensors = pytest.importorskip("safetensors")


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def refused(path):
    with pytest.raises(BadCheckpoint) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))
    assert caught.value.remedy
    return caught.value.problem


def test_header_of_the_real_library_is_read_back(tmp_path):
    numpy = pytest.importorskip("numpy")
    save = pytest.importorskip("safetensors.numpy").save_file
    arrays = {
        "weight": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "scalar": numpy.array(7, dtype=numpy.int64),
        "empty": numpy.zeros((0, 5), dtype=numpy.float16),
        "mask": numpy.array([True, False, True]),
    }
    path = tmp_path / "model.safetensors"
    save(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.path == path
    assert header.size_bytes == path.stat().st_size
    assert dict(header.metadata) == {"format": "np"}
    assert {e.name for e in header.tensors} == set(arrays)
    raw = path.read_bytes()
    for e in header.tensors:
        assert e.shape == arrays[e.name].shape
        assert raw[e.offset_bytes : e.offset_bytes + e.nbytes] == arrays[e.name].tobytes()
    offsets = [e.offset_bytes for e in header.tensors]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_dtype_sizes_are_those_of_the_installed_library(tmp_path, dtype):
    bits = DTYPE_BITS[dtype]
    path = write(tmp_path / "a", {"x": entry((8,), (0, bits), dtype)}, bytes(bits))
    with safetensors.safe_open(path, "np") as theirs:
        assert theirs.get_slice("x").get_shape() == [8]
    assert read_header(path).tensors[0].nbytes == bits


def test_no_dtype_of_the_installed_library_is_missing():
    rust = pytest.importorskip("safetensors._safetensors_rust")
    # serde lists the names it knows when it meets one that it does not
    with pytest.raises(safetensors.SafetensorError) as caught:
        rust.deserialize(struct.pack("<Q", 80) + json.dumps({"x": entry((), (0, 0), "NONE")}).encode().ljust(80))
    listed = {
        word.strip("`") for word in str(caught.value).partition("expected one of")[2].partition(" at line")[0].replace(",", " ").split()
    }
    assert listed, f"the message has changed: {caught.value}"
    assert listed == set(DTYPE_BITS)


def test_offsets_count_from_the_start_of_the_file(tmp_path):
    path = write(tmp_path / "a", {"b": entry((1,), (8, 12)), "a": entry()}, bytes(12))
    start = path.stat().st_size - 12
    assert read_header(path).tensors == (TensorEntry("a", "F32", (2,), start, 8), TensorEntry("b", "F32", (1,), start + 8, 4))


def test_empty_tensor_beside_another_is_no_overlap(tmp_path):
    path = write(tmp_path / "a", {"b": entry(), "a": entry((0,), (0, 0)), "z": entry((0,), (8, 8))}, bytes(8))
    assert [e.name for e in read_header(path).tensors] == ["a", "b", "z"]


def test_empty_file_of_no_tensors_is_a_header(tmp_path):
    assert read_header(write(tmp_path / "a", b"{}")).tensors == ()


def test_missing_file(tmp_path):
    assert refused(tmp_path / "a") == "no such file"


def test_folder_instead_of_file(tmp_path):
    assert refused(tmp_path) == "it is not a file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == "it is not a file"


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "a", b"{}")
    path.chmod(0)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("length", range(8))
def test_file_shorter_than_its_length_field(tmp_path, length):
    path = tmp_path / "a"
    path.write_bytes(bytes(length))
    assert refused(path).startswith(f"{length} bytes long")


@pytest.mark.parametrize("length", [LARGEST_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_longer_than_the_format_allows(tmp_path, length):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"claims {length} bytes" in refused(path)


@pytest.mark.parametrize("length", [3, 10, 1000])
def test_header_longer_than_the_file_says_both_sizes(tmp_path, length):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"expected at least {length + 8} bytes for its header, found 10" in refused(path)


def test_claimed_length_is_not_allocated(tmp_path):
    import tracemalloc

    path = tmp_path / "a"
    with path.open("wb") as file:  # sparse: as long as it says, and nothing but zeros
        file.write(struct.pack("<Q", LARGEST_HEADER_BYTES))
        file.truncate(LARGEST_HEADER_BYTES + 8)
    tracemalloc.start()
    try:
        assert "starts with" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [b"[],", b"1,", b'{"":[0]},', b"[[[[[1]]]]],"])
def test_header_that_would_unfold_to_gigabytes_is_not_parsed(tmp_path, piece):
    header = b'{"a":[' + piece * (4_000_001 // sum(piece.count(sign) for sign in b",[{") + 1) + b"1]}"
    assert "values" in refused(write(tmp_path / "a", header))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("start", "word"),
    [(LFS_POINTER, "Git LFS"), (b"PK\x03\x04" + bytes(60), "zip"), (b"GGUF" + b"\3" * 60, "GGUF"), (b"<!DOCTYPE html>", "web page")],
)
def test_other_formats_are_named(tmp_path, start, word):
    path = tmp_path / "a"
    path.write_bytes(start)
    assert word in refused(path)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b'{"\xff":1}', "not UTF-8"),
        (b'{"a":', "not JSON"),
        (b"{}x", "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b"", "starts with"),
        (b"[]", "starts with"),
        (b"null", "starts with"),
        (b" {}", "starts with"),
        (b"\xef\xbb\xbf{}", "starts with"),
        (b'{"a\x01":1}', "not JSON"),
    ],
    ids=repr,
)
def test_header_is_no_json_object(tmp_path, header, word):
    assert word in refused(write(tmp_path / "a", header[:200_100]))


ENTRY = json.dumps(entry())


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{ENTRY},"a":{ENTRY}}}',
        '{"__metadata__":{},"__metadata__":{}}',
        '{"__metadata__":{"k":"1","k":"2"}}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_duplicate_key(tmp_path, header):
    assert "twice" in refused(write(tmp_path / "a", header.encode(), bytes(8)))


@pytest.mark.parametrize("value", [[], 1, "x", {"k": 1}, {"k": None}])
def test_metadata_that_is_no_table_of_text(tmp_path, value):
    assert refused(write(tmp_path / "a", {"__metadata__": value})).startswith("its __metadata__")


@pytest.mark.parametrize("value", [None, 1, "x", [], True])
def test_entry_that_is_no_object(tmp_path, value):
    assert "not by an object" in refused(write(tmp_path / "a", {"a": value}))


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_entry_without_a_field(tmp_path, field):
    value = entry()
    del value[field]
    assert f"'{field}' is missing" in refused(write(tmp_path / "a", {"a": value}, bytes(8)))


def test_entry_with_an_unknown_field(tmp_path):
    assert "'strides' is unknown" in refused(write(tmp_path / "a", {"a": entry(strides=[1])}, bytes(8)))


@pytest.mark.parametrize("dtype", ["F128", "f32", "", None, 3, [], {}, "torch.float32"])
def test_unknown_dtype(tmp_path, dtype):
    assert "dtype" in refused(write(tmp_path / "a", {"a": entry(dtype=dtype)}, bytes(8)))


@pytest.mark.parametrize("shape", ["[-1]", "[true]", "[null]", '["2"]', "[[2]]", "2", "null", "{}"])
def test_shape_of_wrong_type(tmp_path, shape):
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}'
    problem = refused(write(tmp_path / "a", header.encode(), bytes(8)))
    assert "shape" in problem or "number -1" in problem


@pytest.mark.parametrize("number", ["2.0", "2e0", "-0", "-2", "NaN", "Infinity", "1e999", "9" * 21, "9" * 5000])
@pytest.mark.parametrize("place", ["shape", "data_offsets"])
def test_number_that_is_no_size(tmp_path, number, place):
    value = ENTRY.replace("[2]", f"[{number}]") if place == "shape" else ENTRY.replace("8]", f"{number}]")
    assert "holds the number" in refused(write(tmp_path / "a", f'{{"a":{value}}}'.encode(), bytes(8)))


@pytest.mark.parametrize("shape", [(2**60, 2), (2**31, 2**31), (2**62, 2**62, 0), (0, 2**61), (2,) * 61, (2**40,) * 1000])
def test_absurd_shape(tmp_path, shape):
    assert "2**60" in refused(write(tmp_path / "a", {"a": entry(shape)}, bytes(8)))


@pytest.mark.parametrize("offsets", ["[0]", "[0,8,8]", "[]", "8", "null", "[true,8]", "[0,null]", '["0","8"]', "{}"])
def test_offsets_that_are_not_two_numbers(tmp_path, offsets):
    header = f'{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}'
    assert "data_offsets" in refused(write(tmp_path / "a", header.encode(), bytes(8)))


def test_begin_after_end(tmp_path):
    assert "begins at 8, after its end at 0" in refused(write(tmp_path / "a", {"a": entry(offsets=(8, 0))}, bytes(8)))


@pytest.mark.parametrize(
    ("shape", "dtype", "nbytes"),
    [((3,), "F32", 8), ((1,), "F32", 8), ((3,), "F4", 2), ((3,), "F4", 1), ((5,), "F6_E2M3", 4), ((), "F32", 0), ((0,), "F32", 4)],
)
def test_size_that_is_not_shape_times_dtype(tmp_path, shape, dtype, nbytes):
    assert "its offsets hold" in refused(write(tmp_path / "a", {"a": entry(shape, (0, nbytes), dtype)}, bytes(nbytes)))


def test_overlap_names_both_tensors(tmp_path):
    problem = refused(write(tmp_path / "a", {"first": entry(), "second": entry(offsets=(4, 12))}, bytes(12)))
    assert "'first'" in problem
    assert "'second'" in problem
    assert "overlap" in problem


def test_empty_tensor_inside_another(tmp_path):
    assert "overlap" in refused(write(tmp_path / "a", {"a": entry(), "z": entry((0,), (4, 4))}, bytes(8)))


@pytest.mark.parametrize("offsets", [(4, 12), (16, 24)])
def test_hole(tmp_path, offsets):
    assert "belong to no tensor" in refused(write(tmp_path / "a", {"a": entry(offsets=offsets)}, bytes(offsets[1])))


def test_hole_between_tensors(tmp_path):
    assert "4 bytes between tensor 'a' and tensor 'b'" in refused(
        write(tmp_path / "a", {"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20))
    )


def test_truncated_file_says_expected_and_found(tmp_path):
    path = write(tmp_path / "a", {"a": entry()}, bytes(5))
    size = path.stat().st_size
    assert f"expected {size + 3} bytes, found {size}" in refused(path)


def test_trailing_bytes_are_counted(tmp_path):
    assert refused(write(tmp_path / "a", {"a": entry()}, bytes(11))).startswith("3 bytes too long")


@pytest.mark.parametrize("header", [b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", b'{"__metadata__":{"k":"\\udfff"}}'])
def test_text_that_is_not_unicode(tmp_path, header):
    data = bytes(8) if b"metadata" not in header else b""
    assert "not Unicode" in refused(write(tmp_path / "a", header, data))


def test_message_stays_one_short_line_whatever_the_file_says(tmp_path):
    assert "..." in refused(write(tmp_path / "a", {"line\n" * 100_000: entry(dtype="x\n" * 1000)}, bytes(8)))
    refused(write(tmp_path / "b", {"a": entry((1,) * 100_000, (0, 8))}, bytes(8)))
