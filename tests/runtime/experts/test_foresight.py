"""Expecting experts: what routers answer early, and how much is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from overflowml_core.runtime.experts.bank import banks_of
from overflowml_core.runtime.experts.foresight import Foresight, router_of
from overflowml_core.runtime.structure import dissect
from tests.runtime.experts.build import qwen3_moe

HIDDEN = torch.randn(3, 8)


class Router(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden: torch.Tensor) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


INDEX = torch.tensor([[1, 2], [3, 0], [2, 1]])
LOGITS = torch.tensor([[0.0, 9, 8, 1], [8, 1, 0, 9], [0, 5, 9, 1]])


@pytest.mark.parametrize("answer", [(LOGITS, torch.rand(3, 2), INDEX), (LOGITS, INDEX), LOGITS])
def test_choices_are_found_in_what_routers_answer(answer: Any) -> None:
    foresight = Foresight(Router(answer), 4, 2)
    assert foresight.choices(HIDDEN) is None  # the block may not be there yet in the first pass
    found = foresight.choices(HIDDEN)
    assert found is not None
    assert torch.equal(found, INDEX)


@pytest.mark.parametrize("answer", [RuntimeError("no"), TypeError("no"), "text", torch.rand(3, 5)])
def test_a_router_that_cannot_be_asked_is_let_be(answer: Any) -> None:
    router = Router(answer)
    foresight = Foresight(router, 4, 2)
    for _ in range(20):
        assert foresight.choices(HIDDEN) is None
    router.answer = LOGITS
    assert foresight.choices(HIDDEN) is None


def test_no_memory_is_no_bad_router() -> None:
    foresight = Foresight(Router(torch.OutOfMemoryError("none")), 4, 2)
    foresight.choices(HIDDEN)
    with pytest.raises(torch.OutOfMemoryError):
        foresight.choices(HIDDEN)


def test_expecting_ends_where_it_does_no_good_and_is_tried_again() -> None:
    foresight = Foresight(Router(LOGITS), 4, 2)
    for _ in range(50):
        foresight.learn(0, 2)
    answers = [foresight.choices(HIDDEN) is not None for _ in range(200)]
    assert 0 < sum(answers) <= 4
    for _ in range(50):
        foresight.learn(2, 0)
    assert foresight.choices(HIDDEN) is not None


def test_as_many_as_come_in_while_nothing_else_does() -> None:
    foresight = Foresight(Router(LOGITS), 4, 2)
    for _ in range(200):
        foresight.saw_idle(0.01)
    assert foresight.allowance(1000, 1e6) == 10
    assert foresight.allowance(10**9, 1e6) == 1
    assert foresight.allowance(1000, 0.0) == 2


def test_the_router_beside_a_bank_is_found() -> None:
    model = qwen3_moe()
    for layer, unit in zip(model.model.layers, dissect(model).blocks, strict=True):
        (bank,) = banks_of(unit, 16)
        assert router_of(unit.module, bank) is layer.mlp.gate
