"""The engine on a real CUDA device: same output as resident, within the budget, everything freed. Skipped without one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import overflowml
from overflowml_core.facts import Limits, Tier

pytestmark = pytest.mark.gpu

WIDTH = 2048
LAYER_BYTES = WIDTH * WIDTH * 2


class Layer(nn.Module):
    """One matrix and an activation, in a child, so that the layer counts as a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(self.inner(x))


class Stack(nn.Module):
    """Twelve layers of 8 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(12))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(64, WIDTH, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("layers_in_budget", [3, 6, 11])
@pytest.mark.parametrize("host_memory", ["1GB", "20MB"])
def test_output_equals_resident_within_the_budget(stack, x, layers_in_budget, host_memory):
    with torch.inference_mode():
        expected = stack.to("cuda")(x).cpu()
        stack.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    # cuBLAS keeps a workspace of up to 32 MiB on Hopper, which the allocator counts.
    reserve = 48 * 2**20
    budget = layers_in_budget * LAYER_BYTES + reserve
    attachment = overflowml.manage(stack, Limits(device_memory=budget, reserve=reserve, host_memory=host_memory))
    with torch.inference_mode():
        for _ in range(20):
            assert torch.equal(stack(x).cpu(), expected)
    assert attachment.report().device_peak_bytes - before <= budget
    tiers = {p.tier for p in attachment.plan.placements()}
    assert (Tier.PINNED if host_memory == "1GB" else Tier.DISK) in tiers
    overflowml.release(stack)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < reserve
    with torch.inference_mode():
        assert torch.equal(stack.to("cuda")(x).cpu(), expected)


def test_pinned_bytes_are_what_the_plan_says(stack):
    limits = Limits(device_memory=4 * LAYER_BYTES, reserve=LAYER_BYTES)
    attachment = overflowml.manage(stack, limits)
    assert attachment.report().pinned_bytes == attachment.plan.estimate.pinned_bytes
    overflowml.release(stack)


def test_a_hundred_passes_take_no_more_memory(stack, x):
    attachment = overflowml.manage(stack, Limits(device_memory=4 * LAYER_BYTES + 2**26, reserve=2**26))
    with torch.inference_mode():
        for _ in range(5):
            stack(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        for _ in range(100):
            stack(x)
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    assert attachment.plan.strategy == "stream"
    overflowml.release(stack)
