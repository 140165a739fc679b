"""Records: which bytes of which files belong to an expert, however the checkpoint has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from overflowml_core.facts import Limits
from overflowml_core.layout import slab_bytes
from overflowml_core.loading import Loading, Origin
from overflowml_core.runtime.experts.bank import Bank
from overflowml_core.runtime.experts.record import SPARE_BYTES, as_in_file, records_of, stacked_view
from overflowml_core.runtime.reader import FileReader
from overflowml_core.runtime.source import is_straight, pieces_of
from overflowml_core.runtime.structure import Owner, Weight

COUNT, UP, DOWN = 5, (6, 4), (4, 3)


def bank(dtype: torch.dtype = torch.float32) -> Bank:
    module = nn.Module()
    weights = []
    for name, shape in (("gate_up_proj", UP), ("down_proj", DOWN)):
        parameter = nn.Parameter(torch.empty(COUNT, *shape, dtype=dtype, device="meta"), requires_grad=False)
        module.register_parameter(name, parameter)
        weights.append(Weight(name, parameter, (Owner(module, name),)))
    return Bank("experts", module, COUNT, ("gate_up_proj", "down_proj"), tuple(weights), is_stacked=True)


def loading_of(made: Bank, path: Path, gap_bytes: int) -> tuple[Loading, bytes]:
    """A file that has for each expert down, gate and up one behind the other, and a gap between experts."""
    loading = Loading(Limits())
    down, half = 4 * DOWN[0] * DOWN[1], 4 * UP[0] * UP[1] // 2
    data = bytes((7 * i) % 251 for i in range(64 + COUNT * (down + 2 * half + gap_bytes)))
    path.write_bytes(data)
    ups, downs, at = [], [], 64
    for _ in range(COUNT):
        downs.append(Origin(path, at, down, "F32", DOWN))
        ups.append(Origin(path, at + down, half, "F32", (UP[0] // 2, UP[1])))
        ups.append(Origin(path, at + down + half, half, "F32", (UP[0] // 2, UP[1])))
        at += down + 2 * half + gap_bytes
    loading.scatter(made.weights[0].parameter, tuple(ups))
    loading.scatter(made.weights[1].parameter, tuple(downs))
    return loading, data


@pytest.mark.parametrize("gap_bytes", [0, 4, 5000])
def test_each_expert_has_its_own_bytes(tmp_path: Path, gap_bytes: int) -> None:
    made = bank()
    loading, data = loading_of(made, tmp_path / "model", gap_bytes)
    slabs = records_of(made, loading)
    assert len(slabs) == COUNT
    assert {slab.nbytes for slab in slabs} == {made.record_bytes} == {slab_bytes([96, 48])}
    with FileReader() as reader:
        for expert, slab in enumerate(slabs):
            assert all(is_straight(entry) for entry in slab.entries)
            buffer = torch.zeros(slab.nbytes, dtype=torch.uint8)
            reader.read(pieces_of(slab), buffer)
            start = 64 + expert * (48 + 96 + gap_bytes)
            assert bytes(slab.entries[1].view(buffer).contiguous().view(-1).view(torch.uint8).numpy()) == data[start : start + 48]
            assert bytes(slab.entries[0].view(buffer).contiguous().view(-1).view(torch.uint8).numpy()) == data[start + 48 : start + 144]


def test_a_record_is_one_stretch_of_whole_pages_where_the_file_has_it_so(tmp_path: Path) -> None:
    made = bank()
    loading, data = loading_of(made, tmp_path / "model", 4000)
    for expert, slab in enumerate(records_of(made, loading)):
        placed = as_in_file(slab, len(data))
        assert placed is not None
        laid, piece = placed
        assert piece.file_offset % 4096 == 0
        assert laid.nbytes == piece.nbytes <= slab.nbytes + SPARE_BYTES
        start = 64 + expert * 4144
        assert [piece.file_offset + entry.offset_bytes for entry in laid.entries] == [start + 48, start]
        assert piece.file_offset + piece.nbytes <= len(data)


def test_a_record_whose_tensors_lie_far_apart_is_read_in_pieces(tmp_path: Path) -> None:
    made, path = bank(), tmp_path / "model"
    path.write_bytes(bytes(100_000))
    loading = Loading(Limits())
    loading.defer(made.weights[0].parameter, Origin(path, 0, COUNT * 96, "F32", (COUNT, *UP)))
    loading.defer(made.weights[1].parameter, Origin(path, 50_000, COUNT * 48, "F32", (COUNT, *DOWN)))
    slabs = records_of(made, loading)
    assert [as_in_file(slab, 100_000) for slab in slabs] == [None] * COUNT
    assert [(p.file_offset, p.nbytes) for p in pieces_of(slabs[2])] == [(192, 96), (50_096, 48)]


def test_what_a_file_has_in_another_dtype_is_not_used_from_there(tmp_path: Path) -> None:
    made = bank(torch.float16)
    loading = Loading(Limits())
    loading.defer(made.weights[0].parameter, Origin(tmp_path / "model", 0, COUNT * 96, "F32", (COUNT, *UP)))
    loading.defer(made.weights[1].parameter, Origin(tmp_path / "model", 480, COUNT * 48, "F32", (COUNT, *DOWN)))
    assert not any(is_straight(entry) for slab in records_of(made, loading) for entry in slab.entries)


def test_records_are_seen_as_the_stack_that_they_are() -> None:
    made = bank()
    size, slabs = made.record_bytes, records_of(made, None)
    records = torch.arange(COUNT * size // 4, dtype=torch.float32).view(torch.uint8)
    stack = stacked_view(records, size, slabs[0].entries[1], COUNT)
    assert stack.shape == (COUNT, *DOWN)
    for expert, slab in enumerate(slabs):
        assert torch.equal(stack[expert], slab.entries[1].view(records[expert * size : (expert + 1) * size]))
