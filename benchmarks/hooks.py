"""What the hooks around a streamed block cost in Python: ours beside accelerate's and diffusers', on the same block on the CPU.

    python benchmarks/hooks.py

Each side hooks a copy of the same row of blocks with tiny weights, whose forward does nothing, and moves them from RAM to RAM:
ours one slab a block, accelerate one tensor after the other (``AlignDevicesHook``, ``offload=True``), diffusers one block in a
group, without a stream. What a plain row takes is subtracted. The sides run in turn; a figure is the median of the thread's own
seconds, so that other processes of the machine count for nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.facts import Accelerator, HostMemory, Limits, Machine, Network, Rates, Tier, Workload, network_fingerprint
from overflowml_core.planner import make_plan
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import HostDevice
from overflowml_core.runtime.engine import Engine

BLOCKS = 16
PARAMETERS = (9, 20)
"""A Llama layer has 9 parameters, a block of FLUX 20 or more."""

REPEATS = 50
_PASSES = 5
_PLENTY = 2**40


class Idle(nn.Module):
    """A block of so many small weights that does nothing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x


class Row(nn.Module):
    """Blocks in a row."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle(parameters) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=1.0)
        return x


def measure(repeats: int = REPEATS) -> dict[str, float]:
    """Microseconds of a hook pair a block.

    Args:
        repeats: turns of each side, of five passes over the row.

    Returns:
        By "overflowml", "accelerate" and "diffusers_block" for blocks of 9 weights, and the same names with "_20" for blocks of 20.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for parameters in PARAMETERS:
            row = Row(parameters).eval().requires_grad_(False)
            rows = {"plain": copy.deepcopy(row)}
            engine = _ours(rows.setdefault("overflowml", copy.deepcopy(row)), Path(folder))
            _accelerate(rows.setdefault("accelerate", copy.deepcopy(row)))
            _diffusers(rows.setdefault("diffusers_block", copy.deepcopy(row)))
            medians = _medians({name: _caller(row) for name, row in rows.items()}, repeats)
            engine.detach()
            end = "" if parameters == PARAMETERS[0] else f"_{parameters}"
            found |= {name + end: (medians[name] - medians["plain"]) / BLOCKS * 1e6 for name in rows if name != "plain"}
    return found


def _caller(row: nn.Module) -> Callable[[], object]:
    x = torch.zeros(1, 4)

    def call() -> object:
        # Under no_grad, as every host runs its models.
        with torch.no_grad():
            return row(x)

    return call


def _medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # what the other sides pushed out of the caches comes back
            started = time.thread_time()
            for _ in range(_PASSES):
                call()
            seconds[name].append((time.thread_time() - started) / _PASSES)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _ours(row: nn.Module, folder: Path) -> Engine:
    """Every block streamed from RAM through two slots."""
    component = describe_module(row, "row")
    network = Network((component,), "benchmark", "Row", network_fingerprint((component,)))
    accelerator = Accelerator("cuda", "none", 0, _PLENTY, _PLENTY)
    machine = Machine((accelerator,), HostMemory(_PLENTY, _PLENTY, _PLENTY, 2), Rates(1e9, 1e9, 1e9), 0)
    budget = component.resident_bytes + 2 * component.blocks[0].slab_bytes
    plan = make_plan(network, machine, Workload(), Limits.exactly(device_memory=budget, reserve=0))
    assert all(p.tier is Tier.PINNED for p in plan.phases[0].placements)
    return Engine(dataclasses.replace(plan, fingerprint=""), network, HostDevice(), folder).attach({"row": row}, None)


def _accelerate(row: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for block in row.blocks:
        weights = {name: tensor.detach() for name, tensor in block.state_dict().items()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(block, hook)


def _diffusers(row: nn.Module) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(row, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


if __name__ == "__main__":
    for side, microseconds in measure().items():
        print(f"{side:20} {microseconds:8.1f} us a block")
