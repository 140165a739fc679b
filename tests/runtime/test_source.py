"""Weights and where they come from: mapped files, what to read for a slab, stretches of whole weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.errors import ReadFault
from overflowml_core.loading import Origin
from overflowml_core.runtime.homes import FileMaps
from overflowml_core.runtime.slab import Entry, lay_out
from overflowml_core.runtime.source import pieces_of, stored_as_is, windows
from overflowml_core.runtime.structure import Weight, dissect
from tests.runtime.build import on_meta, save, stack

# ---- mapped files


def test_writing_to_a_mapped_weight_changes_no_file(tmp_path: Path) -> None:
    module = stack(2, 8)
    path = save(dict(module.named_parameters()), tmp_path / "m.safetensors")
    before = path.read_bytes()
    twin, loading = on_meta(module, path)
    slab = lay_out(dissect(twin).blocks[0], loading)
    assert stored_as_is(slab)
    view = FileMaps().view(slab.entries[0])
    assert torch.equal(view, module.blocks[0].up.weight)
    view.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("shift", range(4))
def test_mapped_weights_are_aligned_to_their_elements(shift: int, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    values = torch.randn(5)
    path.write_bytes(b"\0" * (64 + shift) + bytes(values.numpy().tobytes()))
    view = FileMaps().view(entry_at(path, 64 + shift, values))
    assert torch.equal(view, values)
    assert view.data_ptr() % 4 == 0


def entry_at(path: Path, offset: int, values: torch.Tensor) -> Entry:
    parameter = torch.nn.Parameter(values)
    origin = Origin(path, offset, values.nbytes, "F32", tuple(values.shape))
    return Entry(Weight("w", parameter, ()), 0, values.nbytes, tuple(values.shape), values.stride(), values.dtype, origin)


@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
def test_mapping_a_damaged_file_is_a_fault(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    values = torch.randn(8)
    path.write_bytes(values.numpy().tobytes())
    entry = entry_at(path, 0, values)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 20 if damage == "short" else 0)
    with pytest.raises(ReadFault) as caught:
        FileMaps().view(entry)
    assert (caught.value.path, caught.value.offset, caught.value.expected_bytes) == (path, 0, 32)
    assert caught.value.got_bytes == (20 if damage == "short" else 0)


# ---- pure parts


@dataclass
class _Sized:
    offset_bytes: int
    nbytes: int
    weight: object


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 1000))
def test_stretches_hold_whole_weights_in_order_and_no_more_than_asked(sizes: list[int], limit: int) -> None:
    entries, end = [], 0
    for size in sizes:
        entries.append(_Sized(end, size, object()))
        end += -(-size // 512) * 512
    stretches = list(windows(entries, limit))  # type: ignore[arg-type]
    assert [e for _, _, part in stretches for e in part] == entries
    for first, last, part in stretches:
        assert (first, last) == (part[0].offset_bytes, part[-1].offset_bytes + part[-1].nbytes)
        assert last - first <= limit or len(part) == 1


def test_pieces_of_a_slab_skip_what_no_file_holds(tmp_path: Path) -> None:
    module = stack(2, 8)
    assert pieces_of(lay_out(dissect(module).blocks[0], None)) == []
