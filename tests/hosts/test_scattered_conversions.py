"""Where a converted weight lies in files: what transformers' own converters make of the values, or nothing where it is more than pieces."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from overflowml_core.loading import Origin
from overflowml_transformers.scattered import pieces_of

ONE, TWO = ["experts.*.a.weight"], ["experts.*.a.weight", "experts.*.b.weight"]
TARGET = "experts.ab"


class Case:
    """Tensors by source pattern, as one long file of float32, and a converter for them."""

    def __init__(self, shapes: dict[str, list[tuple[int, ...]]], operations: list[Any], patterns: list[str] | None = None) -> None:
        self.converter = WeightConverter(list(patterns or shapes), TARGET, operations)
        self.values = torch.arange(sum(math.prod(shape) for each in shapes.values() for shape in each), dtype=torch.float32)
        self.tensors: dict[str, list[torch.Tensor]] = {}
        self.origins: dict[str, list[Origin]] = {}
        first = 0
        for pattern, each in shapes.items():
            for shape in each:
                last = first + math.prod(shape)
                self.tensors.setdefault(pattern, []).append(self.values[first:last].view(shape))
                self.origins.setdefault(pattern, []).append(Origin(Path("m"), 4 * first, 4 * (last - first), "F32", shape))
                first = last

    def hosts(self) -> torch.Tensor | None:
        """What the host makes of the values; None where it fails."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in self.tensors.items():
            for tensor in tensors:
                converter.add_tensor(TARGET, "key", pattern, tensor)
        try:
            made = converter.convert(f"layers.0.{TARGET}")
        except (RuntimeError, ValueError, IndexError, KeyError):
            return None
        return made.get(f"layers.0.{TARGET}")

    def ours(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        """What our pieces hold, one behind the other; None where there are none."""
        pieces = pieces_of(self.converter, self.origins, shape)
        if not pieces:
            return None
        return torch.cat([self.values[p.offset_bytes // 4 : (p.offset_bytes + p.nbytes) // 4] for p in pieces]).view(shape)


EXPERTS = {TWO[0]: [(3, 5)] * 12, TWO[1]: [(2, 5)] * 12}
BIASES = {TWO[0]: [(3,)] * 12, TWO[1]: [(2,)] * 12}
STACKS = {TWO[0]: [(4, 3, 512)], TWO[1]: [(4, 2, 512)]}


@pytest.mark.parametrize(
    ("shapes", "operations", "count"),
    [
        (EXPERTS, [MergeModulelist(dim=0), Concatenate(dim=1)], 24),
        (BIASES, [MergeModulelist(dim=0), Concatenate(dim=1)], 24),
        ({ONE[0]: [(3, 5)] * 12}, [MergeModulelist(dim=0)], 12),
        ({TWO[0]: [(3, 5)], TWO[1]: [(2, 5)]}, [Concatenate(dim=0)], 2),
        ({ONE[0]: [(3, 5)] * 4}, [Concatenate(dim=0)], 4),
        (STACKS, [Concatenate(dim=1)], 8),
    ],
)
def test_what_is_put_together_is_known_by_its_pieces(shapes: Any, operations: list[Any], count: int) -> None:
    case = Case(shapes, operations)
    expected = case.hosts()
    assert expected is not None
    assert len(pieces_of(case.converter, case.origins, tuple(expected.shape))) == count
    ours = case.ours(tuple(expected.shape))
    assert ours is not None
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("shapes", "operations"),
    [
        (EXPERTS, [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)]),
        ({ONE[0]: [(4, 4)]}, [Transpose(0, 1)]),
        ({ONE[0]: [(4, 5)] * 4}, [MergeModulelist(dim=1)]),
        ({ONE[0]: [(3, 5)] * 4}, [MergeModulelist(dim=0), Concatenate(dim=1)]),
        ({TWO[0]: [(3, 5)] * 4, TWO[1]: [(2, 5)] * 3}, [MergeModulelist(dim=0), Concatenate(dim=1)]),
        ({TWO[0]: [(3, 5)], TWO[1]: [(3, 2)]}, [Concatenate(dim=1)]),  # a piece for each row
        ({ONE[0]: [(4, 5)]}, [Chunk(dim=0)]),
        ({ONE[0]: [(0, 5)] * 2}, [Concatenate(dim=0)]),
    ],
)
def test_whatever_is_more_than_pieces_is_left_to_the_host(shapes: Any, operations: list[Any]) -> None:
    case = Case(shapes, operations)
    made = case.hosts()
    shape = tuple(made.shape) if made is not None else (4, 5, 5)
    assert case.ours(shape) is None


def test_missing_sources_other_shapes_and_mixed_dtypes_are_left_to_the_host() -> None:
    case = Case(EXPERTS, [MergeModulelist(dim=0), Concatenate(dim=1)])
    assert case.ours((12, 5, 5)) is not None
    assert case.ours((11, 5, 5)) is None
    assert case.ours((12, 25)) is None
    assert pieces_of(case.converter, {TWO[0]: case.origins[TWO[0]]}, (12, 3, 5)) == ()
    case.origins[TWO[1]][3] = Origin(Path("m"), 0, 20, "F16", (2, 5))
    assert case.ours((12, 5, 5)) is None
    several = WeightConverter(ONE, [TARGET, "experts.other"], [MergeModulelist(dim=0)])
    assert pieces_of(several, {ONE[0]: case.origins[TWO[0]]}, (12, 3, 5)) == ()


_OPERATIONS = st.lists(
    st.one_of(
        st.builds(MergeModulelist, dim=st.integers(0, 1)),
        st.builds(Concatenate, dim=st.integers(-1, 3)),
        st.builds(Transpose, dim0=st.just(0), dim1=st.integers(0, 1)),
    ),
    min_size=1,
    max_size=3,
)
_SHAPES = st.lists(st.sampled_from([(2, 4), (3, 4), (2, 3, 4), (3, 2048), (2, 2, 2048), (4,), (2,), ()]), min_size=1, max_size=3)


@given(first=_SHAPES, second=st.one_of(st.none(), _SHAPES), same=st.booleans(), operations=_OPERATIONS)
@settings(max_examples=150)
def test_pieces_never_differ_from_what_the_host_makes(first: Any, second: Any, same: bool, operations: list[Any]) -> None:
    shapes = {TWO[0]: [first[0]] * len(first) if same else first}
    if second is not None:
        shapes[TWO[1]] = [second[0]] * len(first) if same else second
    case = Case(shapes, operations)
    expected = case.hosts()
    if expected is None:
        count = sum(len(each) for each in shapes.values())
        assert all(case.ours((count, *rest)) is None for rest in ((), first[0]))
    else:
        ours = case.ours(tuple(expected.shape))
        assert ours is None or torch.equal(ours, expected)
