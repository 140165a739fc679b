"""Which weights formats may convert, and that the planner counts exactly these."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from overflowml_core.facts import Linear
from overflowml_core.formats import Format, PartSize
from overflowml_core.layout import slab_bytes
from overflowml_core.planner.conversion import weigh
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.structure import dissect

INT8 = Format("int8", 8.01, "minimal", 0.01, parts=(PartSize(8), PartSize(32, 0), PartSize(8, 0)))


class Scaled(nn.Linear):
    """Computes with its weight in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Model(nn.Module):
    """Two equal blocks behind an embedding to which the head is tied."""

    _keep_in_fp32_modules = ("wo", "mix.gate")

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(self._block(width) for _ in range(2))
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    @staticmethod
    def _block(width: int) -> Block:
        mix = Block(gate=nn.Linear(width, width), gate_up=nn.Linear(width, width))
        return Block(
            up=nn.Linear(width, 2 * width),
            wo=nn.Linear(2 * width, width),
            mix=mix,
            norm=nn.LayerNorm(width),
            attention=nn.MultiheadAttention(width, 4),
            conv=nn.Conv1d(width, width, 1),
            scaled=Scaled(width, width),
            adapted=Block(lora_A=Block(default=nn.Linear(width, 8)), base_layer=nn.Linear(width, width)),
        )


def test_layers_that_are_called_and_that_nobody_wants_kept() -> None:
    structure = dissect(Model())
    names = {weight.name for unit in structure.units for weight in unit.weights if weight.convertible}
    assert names == {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "mix.gate_up", "adapted.base_layer")}


def _is_convertible(model: nn.Module, name: str) -> bool:
    return next(weight.convertible for weight in dissect(model).blocks[0].weights if weight.name == name)


def test_what_is_shared_is_convertible_where_all_its_places_are() -> None:
    model = Model()
    block = model.blocks[0]
    block.again = nn.Linear(64, 128, bias=False)
    block.again.weight = block.up.weight
    assert _is_convertible(model, "blocks.0.up.weight")
    block.table = nn.Embedding(128, 64)
    block.table.weight = block.up.weight
    assert not _is_convertible(model, "blocks.0.up.weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_what_is_packed_already_is_left_alone(dtype: torch.dtype) -> None:
    model = Model()
    layer = model.blocks[0].up
    layer.weight = nn.Parameter(torch.zeros(128, 64).to(dtype), requires_grad=False)
    assert not _is_convertible(model, "blocks.0.up.weight")


def test_the_description_counts_them_by_shape() -> None:
    (first, _) = describe_module(Model(), "model").blocks
    assert first.linears == (Linear(64, 64, "F32", 2), Linear(128, 64, "F32", 1))
    assert first.linear_count == 2 * 64 * 64 + 128 * 64


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_block_weighs_what_its_parts_do(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    layers = {f"layer{i}": nn.Linear(columns, rows, dtype=dtype) for i, (rows, columns) in enumerate(shapes)}
    model = Block(blocks=nn.ModuleList([Block(**layers), Block(**{name: nn.Linear(4, 4) for name in layers})]))
    block = next(b for b in describe_module(model, "model").blocks if b.name == "blocks.0")
    sizes: list[int] = []
    for rows, columns in shapes:
        plain = rows * columns * dtype.itemsize
        parts = [rows * columns, 4 * rows, rows]
        sizes += [rows * dtype.itemsize, *(parts if slab_bytes(parts) < slab_bytes([plain]) else [plain])]
    assert weigh(block, INT8).slab_bytes == slab_bytes(sizes)
    assert bool(weigh(block, INT8).format) == (slab_bytes(sizes) < block.slab_bytes)
