"""What operations cost by hand and by trace, recipes that run, and profiles that are continued."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from overflowml_core.runtime.fake import Call, tracing
from overflowml_core.runtime.probe import guess_note, held_bytes, pass_profile, run_recipe
from overflowml_core.runtime.probe_fit import continued
from overflowml_core.runtime.probe_works import Recipe, touched_bytes
from overflowml_core.work import BlockWork, PassProfile, Work
from tests.runtime import models

F = torch.nn.functional


class Step(nn.Module):
    """A module that does one thing with its weight."""

    def __init__(self, weight: tuple[int, ...], do: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*weight, dtype=torch.bfloat16), requires_grad=False)
        self.do = do

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.do(self.weight, *inputs)


def traced(weight: tuple[int, ...], do: Any, *shapes: tuple[int, ...]) -> tuple[Call, dict[str, Recipe]]:
    with tracing() as tracer:
        module = Step(weight, do)
        tracer.watch("step", module)
        module(*(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes))
        return tracer.calls[0], tracer.recipes


def only(works: tuple[Work, ...], kind: str) -> Work:
    (work,) = (work for work in works if work.kind == kind)
    return work


def test_a_linear_layer() -> None:
    call, _ = traced((48, 32), lambda w, x: F.linear(x, w), (10, 32))
    work = only(call.outside, "matmul")
    assert (work.dtype, work.calls) == ("BF16", 1)
    assert work.flop == 2 * 10 * 32 * 48
    assert work.weight_bytes == 48 * 32 * 2
    assert work.traffic_bytes == 48 * 32 * 2 + 10 * 32 * 2 + 10 * 48 * 2


def test_a_convolution() -> None:
    call, _ = traced((8, 4, 3, 3), lambda w, x: F.conv2d(x, w, padding=1), (2, 4, 16, 16))
    work = only(call.outside, "conv")
    assert work.flop == 2 * (2 * 16 * 16) * 8 * (4 * 3 * 3)
    assert work.traffic_bytes == 2 * (2 * 4 * 16 * 16 + 8 * 4 * 9 + 2 * 8 * 16 * 16)


def test_attention_of_grouped_queries() -> None:
    # 8 heads of queries over 2 of keys and values: operations by the queries' heads, bytes by what is really read.
    def do(w: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q * w, k, v, enable_gqa=True)

    call, _ = traced((1,), do, (1, 8, 100, 16), (1, 2, 120, 16), (1, 2, 120, 24))
    work = only(call.outside, "attention")
    assert work.flop == 2 * 8 * 100 * 120 * (16 + 24)
    assert work.traffic_bytes == 2 * (8 * 100 * 16 + 2 * 120 * 16 + 2 * 120 * 24 + 8 * 100 * 24)


def test_few_rows_read_few_experts() -> None:
    def do(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, w, offs=torch.arange(1, 17, dtype=torch.int32))

    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    few = only(traced((16, 32, 64), do, (3, 32))[0].outside, "matmul")
    many = only(traced((16, 32, 64), do, (100, 32))[0].outside, "matmul")
    assert few.flop == 2 * 3 * 32 * 64
    assert few.weight_bytes == 3 * 32 * 64 * 2
    assert many.weight_bytes == 16 * 32 * 64 * 2


def test_a_lookup_reads_the_rows_that_it_returns() -> None:
    call, _ = traced((1000, 32), lambda w, x: F.embedding(x.long(), w), (1, 5))
    reads = [work for work in call.outside if work.weight_bytes]
    assert [work.weight_bytes for work in reads] == [5 * 32 * 2]
    assert reads[0].traffic_bytes == 2 * 5 * 32 * 2 + 5 * 8


def test_views_and_empty_tensors_cost_nothing() -> None:
    call, _ = traced((4, 4), lambda w, x: (w.t(), x[1:].view(-1), torch.empty_like(w), w.detach()), (4, 4))
    assert call.outside == ()


def test_work_in_place_is_read_and_written() -> None:
    add, _ = traced((1,), lambda w, x: x.mul_(w), (100,))
    assert only(add.outside, "memory").traffic_bytes == 2 * 100 * 2 + 2
    fill, _ = traced((1,), lambda w, x: (x * w).zero_(), (100,))
    assert [work.traffic_bytes for work in fill.outside] == [2 * 100 * 2 + 2, 100 * 2]


def test_expanded_dimensions_are_read_once() -> None:
    assert touched_bytes(torch.zeros(1, 8).expand(1000, 8)) == 32


def test_a_llama_by_hand() -> None:
    # 4 layers, width 32, 4 heads over 2, feed-forward 48, vocabulary 64; 5 tokens, logits for one.
    with tracing() as tracer:
        model = models.llama()
        tracer.watch("model", model)
        model(torch.ones(1, 5, dtype=torch.long), logits_to_keep=1)
    (call,) = tracer.calls
    attention = 4 * 5 * 5 * 32
    layer = 2 * 5 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)
    assert [block.flop for block in call.blocks] == [layer + attention] * 4
    assert call.flop == 4 * (layer + attention) + 2 * 32 * 64


def test_every_recipe_of_a_model_runs_and_makes_what_the_trace_said() -> None:
    with tracing() as tracer:
        model = models.llama()
        tracer.watch("model", model)
        model(torch.ones(1, 5, dtype=torch.long))
    works = {work.signature for block in tracer.calls[0].blocks for work in block.works}
    assert works <= set(tracer.recipes)
    for recipe in tracer.recipes.values():
        assert run_recipe(recipe, "cpu")() is not None


def test_a_recipe_has_data_of_the_traced_shapes() -> None:
    call, recipes = traced((48, 32), lambda w, x: F.linear(x, w), (10, 32))
    out = run_recipe(recipes[only(call.outside, "matmul").signature], "cpu")()
    assert isinstance(out, torch.Tensor)
    assert (out.shape, out.dtype) == ((10, 48), torch.bfloat16)
    assert out.float().std() > 0


def test_recipe_of_experts_gives_each_its_rows() -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    offsets = lambda: torch.zeros(4, dtype=torch.int32)  # noqa: E731 -- the trace must not see a value
    call, recipes = traced((4, 32, 64), lambda w, x: F.grouped_mm(x, w, offs=offsets()), (8, 32))
    out = run_recipe(recipes[only(call.outside, "matmul").signature], "cpu")()
    assert isinstance(out, torch.Tensor)
    assert (out.abs().sum(dim=1) > 0).all()


def test_held_bytes_counts_each_storage_once() -> None:
    class Holder:
        def __init__(self) -> None:
            self.layers = [{"keys": torch.zeros(10)}, (torch.zeros(3, dtype=torch.int64),)]
            self.again = self.layers[0]["keys"][2:]  # type: ignore[call-overload]
            self.owner = self

    assert held_bytes(Holder()) == 40 + 24
    assert held_bytes(None) == 0


def test_guesses_are_told() -> None:
    call = Call("a", "forward", "", 10, 0, (), (), guesses=2)
    assert pass_profile(call, "encode", 1, note="one image").note == "one image; 2 values that the code reads were taken as zero"
    assert guess_note(1).startswith("1 value ")
    assert pass_profile(Call("a", "forward", "", 10, 0, (), ()), "encode", 1).note == ""


numbers = st.integers(min_value=0, max_value=10**6)


@given(numbers, numbers, numbers, st.integers(min_value=1, max_value=10**6))
def test_continued_work_follows_a_polynomial_exactly(a: int, b: int, c: int, target: int) -> None:
    def at(n: int) -> PassProfile:
        value = a * n * n + b * n + c
        works = (Work("matmul", "BF16", value, value, c, 1 + n, f"shape {n}"),)
        return PassProfile("prefill", 1, value, (BlockWork(works, b * n),), works, b * n)

    points = (16, 32, 48)
    found = continued([at(n) for n in points], points, target, 7, "why")
    expected = a * target * target + b * target + c
    (work,) = found.outside
    assert (work.flop, work.traffic_bytes, work.weight_bytes, work.calls) == (expected, max(expected, c), c, 1 + target)
    assert found.blocks[0].activation_bytes == b * target
    assert (found.cache_bytes, found.count, found.source, found.note) == (b * target, 7, "analytic", "why")
    assert found.activation_bytes >= found.cache_bytes
