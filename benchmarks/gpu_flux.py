"""Step time and peak memory of a FLUX.1-dev-sized transformer (random weights) under a budget, beside the peers and the limit.

Sides take turns in one process: ours, accelerate's sequential offload, diffusers' group offload with streams, and fully resident where the
device holds it. The limit is t* = max(resident step, streamed bytes / pinned copy rate), both measured in the same run.

    python benchmarks/gpu_flux.py --budget 8GB --json benchmarks/results/gpu_flux.json

Without an accelerator (--device cpu) only ours and resident run, on a small model: a check of the script, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from report import Report

import overflowml
from overflowml_core.units import parse_bytes

FULL = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SMALL = {**FULL, "num_layers": 3, "num_single_layers": 6, "num_attention_heads": 2}


def build(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """The transformer in bfloat16 on the CPU, with seeded random weights."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    generator = torch.Generator(device).manual_seed(0)
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(config)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                # Drawn on the device: 12 billion numbers take minutes on a CPU.
                values = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
                module._parameters[name] = torch.nn.Parameter(values.cpu(), requires_grad=False)
    return model.eval()


def inputs(config: dict[str, Any], device: torch.device, edge: int) -> dict[str, Any]:
    """What one denoising step of an image of this edge in pixels is given."""
    tokens = (edge // 16) ** 2
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    return {
        "hidden_states": random(1, tokens, config["in_channels"]),
        "encoder_hidden_states": random(1, 512, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.ones(1, device=device, dtype=torch.bfloat16),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(512, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
        "return_dict": False,
    }


@contextmanager
def ours(model: torch.nn.Module, device: torch.device, budget_bytes: int, reserve_bytes: int) -> Iterator[Any]:
    """Managed by overflowml, with the device's memory capped at the budget."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0), device)
    try:
        yield overflowml.manage(model, overflowml.Limits(device_memory=budget_bytes, reserve=reserve_bytes))
    finally:
        overflowml.release(model)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def sequential(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """accelerate's sequential offload."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(model, device, offload_buffers=True)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)


@contextmanager
def group(model: Any, device: torch.device) -> Iterator[None]:
    """diffusers' group offload, a block a group, with streams."""
    from diffusers.hooks import HookRegistry

    model.enable_group_offload(
        onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
    )
    try:
        yield
    finally:
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if isinstance(registry, HookRegistry):
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)
        model.to("cpu")


@contextmanager
def resident(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Everything on the device."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def run_steps(model: torch.nn.Module, arguments: dict[str, Any], device: torch.device, count: int) -> tuple[list[float], int, torch.Tensor]:
    """Seconds of each step after one to warm up, peak allocated bytes, and the output on the CPU."""
    accelerated = device.type != "cpu"
    module = torch.get_device_module(device)
    if accelerated:
        module.synchronize()
        module.reset_peak_memory_stats()
    seconds = []
    with torch.inference_mode():
        for _ in range(count + 1):
            started = time.perf_counter()
            output = model(**arguments)[0]
            if accelerated:
                module.synchronize()
            seconds.append(time.perf_counter() - started)
    peak = int(module.max_memory_allocated()) if accelerated else 0
    return seconds[1:], peak, output.cpu()


def link_rate(device: torch.device, nbytes: int = 2**30) -> float:
    """Bytes a second of a pinned copy to the device, median of five."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    module = torch.get_device_module(device)
    seconds = []
    for _ in range(6):
        module.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        module.synchronize()
        seconds.append(time.perf_counter() - started)
    return nbytes / statistics.median(seconds[1:])


def measure(options: argparse.Namespace) -> Report:
    """Run all sides in turn and report."""
    report = Report("gpu_flux")
    device = torch.device(options.device)
    accelerated = device.type != "cpu"
    config = FULL if accelerated and not options.small else SMALL
    budget_bytes = parse_bytes(options.budget, "--budget")
    model = build(config, device)
    arguments = inputs(config, device, options.edge)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    report.add("weights_bytes", weight_bytes, "bytes")
    report.add("budget_bytes", budget_bytes, "bytes")

    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours(model, device, budget_bytes, parse_bytes(options.reserve, "--reserve"))}
    if accelerated:
        sides["sequential"] = lambda: sequential(model, device)
        sides["group"] = lambda: group(model, device)
    if not accelerated or torch.get_device_module(device).mem_get_info()[0] > weight_bytes * 1.2:
        sides["resident"] = lambda: resident(model, device)

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    outputs: dict[str, torch.Tensor] = {}
    streamed_bytes = 0
    for _ in range(options.rounds):
        for name, enter in sides.items():
            with enter() as attachment:
                taken, peaks[name], outputs[name] = run_steps(model, arguments, device, options.steps)
                seconds[name] += taken
                if name == "ours":
                    streamed_bytes = attachment.plan.estimate.streamed_bytes
                    peaks[name] = max(peaks[name], attachment.report().device_peak_bytes)
            gc.collect()
            if accelerated:
                torch.get_device_module(device).empty_cache()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in sides:
        report.add(f"{name}.step_s", medians[name], "s")
        report.add(f"{name}.peak_bytes", peaks[name], "bytes")
    report.add("ours.peak_over_budget", peaks["ours"] / budget_bytes, "ratio")
    report.add("ours.streamed_bytes", streamed_bytes, "bytes")
    for name in ("sequential", "group"):
        if name in sides:
            report.add(f"ours.vs_{name}", medians[name] / medians["ours"], "times as fast")
    if "resident" in sides:
        report.add("ours.identical", float(torch.equal(outputs["ours"], outputs["resident"])), "1 is yes")
    if accelerated and "resident" in sides:
        rate = link_rate(device)
        report.add("link_bytes_per_s", rate, "bytes/s")
        report.add("ours.over_limit", medians["ours"] / max(medians["resident"], streamed_bytes / rate), "ratio")
    return report


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", default="8GB")
    parser.add_argument("--reserve", default="1GB", help="kept free for activations")
    parser.add_argument("--edge", type=int, default=1024, help="pixels of the image's edge")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small transformer on the accelerator, to check the script")
    parser.add_argument("--quick", action="store_true", help="one round of two steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 2, 1
    measure(options).write(options.json)


if __name__ == "__main__":
    main()
