"""Every class of experts of the installed transformers: docs/experts-models.md lists it, and apart it computes what it did before.

Models are built without weights, by tools/expert_models.py; the experts of each by themselves, tiny and with weights.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from overflowml_core.facts import Tier
from overflowml_core.runtime.device import HostDevice
from tests.hosts.check import assert_same
from tests.runtime.experts.build import attach
from tools import expert_models

PAGE = expert_models.PAGE.read_text(encoding="utf-8")
VERSION = re.findall(r"from transformers ([\d.]+[\d])", PAGE)[0]
LINES = re.findall(r"^\| `(\w+)` \|.*$", PAGE, re.M)
APART = re.findall(r"^\| `(\w+)` .*\| stacked.*\| yes \|$", PAGE, re.M)
EXPERTS, PER_TOKEN, HIDDEN, TOKENS = 6, 2, 16, 11


@functools.cache
def families() -> dict[str, expert_models.Family]:
    return {family.name: family for family in expert_models.families()}


@functools.cache
def found(name: str) -> list[tuple[expert_models.Row, Any]]:
    return expert_models.rows_of(families()[name])


def family_of(experts: str) -> str:
    found = next((family.name for family in families().values() if experts in family.experts), None)
    if found is None:
        pytest.skip(f"not in transformers {transformers.__version__}")
    return found


def test_every_class_is_on_the_page():
    unknown = [family.name for family in families().values() if not family.experts]
    assert unknown == [], "models that count experts, of a class that tools/expert_models.py does not know: describe it there"
    installed = {name for family in families().values() for name in family.experts}
    assert installed - set(LINES) == set(), "new in transformers: run tools/expert_models.py, which adds it to docs/experts-models.md"
    if transformers.__version__ == VERSION:
        assert set(LINES) - installed == set(), "not in transformers any more: run tools/expert_models.py"


@pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the page is of transformers {VERSION}")
@pytest.mark.parametrize("experts", LINES)
def test_the_page_says_what_a_class_allows(experts):
    rows = [str(row) for row, _ in found(family_of(experts)) if row.experts == experts]
    assert len(rows) == 1
    assert rows[0] in PAGE.splitlines(), "run tools/expert_models.py"


class Block(nn.Module):
    """A block of nothing but experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)


class Blocks(nn.Module):
    """Two of them."""

    def __init__(self, config: Any, experts: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(one) for one in experts)

    def forward(self, *args: torch.Tensor) -> list[torch.Tensor]:
        return [layer(*args) for layer in self.layers]


def _tiny(config: Any) -> Any:
    """The same configuration with other sizes."""
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value > PER_TOKEN:
            setattr(config, name, _size(name))
        elif isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
            setattr(config, name, type(value)(_size(name) for _ in value))
    return config


def _size(name: str) -> int:
    if "per_tok" in name or "top" in name or name == "moe_k":
        return PER_TOKEN
    if "intermediate" in name or "ffn" in name:
        return HIDDEN // 2
    return EXPERTS if "expert" in name else HIDDEN


def _blocks(module: Any) -> Blocks:
    config = _tiny(module.config)
    torch.manual_seed(3)
    experts = [type(module)(config) for _ in range(2)]
    for parameter in (parameter for one in experts for parameter in one.parameters()):
        parameter.data = torch.randn(parameter.shape) * 0.3
    return Blocks(config, experts).eval().requires_grad_(False)


@pytest.mark.parametrize("experts", APART)
def test_a_class_computes_apart_what_it_computes_itself(experts, tmp_path):
    model = _blocks(next(module for row, module in found(family_of(experts)) if row.experts == experts))
    assert model.layers[0].experts.num_experts == EXPERTS
    index = torch.stack([torch.randperm(EXPERTS)[:PER_TOKEN] for _ in range(TOKENS)])
    args = (torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, PER_TOKEN))
    for implementation in ("eager", "grouped_mm"):
        model.config._experts_implementation = implementation
        theirs = model(*args)
        engine = attach(model, HostDevice(), tmp_path, slots=3, tier=Tier.RAM)
        assert len(engine.experts.callers()) == 2
        ours = model(*args)
        # Elements that a vector of the processor does not fill are rounded by another function, and a gate that makes tensors of its own
        # puts other elements there. The host's two implementations differ among themselves by as much.
        if expert_models.has_own_gate(model.layers[0].experts):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert_same(ours, theirs)
        engine.detach()
        assert model.config._experts_implementation == implementation
        assert_same(model(*args), theirs)
