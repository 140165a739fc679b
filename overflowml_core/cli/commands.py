"""The commands that are a few lines each: what they take, whom they ask, how they print."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from overflowml_core.facts import Bytes, Limits, Machine, Workload
from overflowml_core.units import format_bytes, parse_bytes

_JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
_SIZE = "a size such as 8GB or 512MiB"


def plan(
    source: Annotated[str, typer.Argument(help="A folder with a diffusers pipeline or a transformers model.")],
    vram: Annotated[str | None, typer.Option(help=f"Budget of the compute tier, {_SIZE}; what is free by default.")] = None,
    ram: Annotated[str | None, typer.Option(help=f"RAM for weights outside the device, {_SIZE}.")] = None,
    reserve: Annotated[str | None, typer.Option(help=f"Part of the budget kept for activations, {_SIZE}; estimated by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As from_pretrained takes it: bfloat16, float16, float32.")] = None,
    height: Annotated[int | None, typer.Option(help="Height of an image in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of an image in pixels.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.")] = None,
    batch: Annotated[int, typer.Option(help="Images or sequences at once.")] = 1,
    as_json: _JSON = False,
) -> None:
    """Show where every weight of a model would live, before anything is loaded."""
    import overflowml

    limits = Limits(device_memory=_size(vram, "--vram"), host_memory=_size(ram, "--ram"), reserve=_size(reserve, "--reserve"))
    workload = Workload(height=height, width=width, prompt_tokens=prompt_tokens, batch=batch)
    options = {} if dtype is None else {"torch_dtype": _torch_dtype(dtype)}
    made = overflowml.plan(Path(source), limits, workload, **options)
    typer.echo(made.to_json() if as_json else made.summary())


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else Bytes(parse_bytes(text, option))


def _torch_dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise typer.BadParameter(f"{name!r} is no dtype of torch; bfloat16, float16 and float32 are")
    return found


def detect(as_json: _JSON = False) -> None:
    """Show this machine as plans see it."""
    import overflowml

    machine = overflowml.detect()
    typer.echo(json.dumps(dataclasses.asdict(machine), indent=2) if as_json else _describe_machine(machine))


def _describe_machine(machine: Machine) -> str:
    lines = []
    for accelerator in machine.accelerators:
        shared = ", shared with the CPU" if accelerator.unified else ""
        lines.append(
            f"accelerator  {accelerator.name} ({accelerator.torch_name}, {accelerator.backend}): "
            f"{format_bytes(accelerator.free_bytes)} free of {format_bytes(accelerator.total_bytes)}{shared}"
        )
    if not lines:
        lines.append("accelerator  none: RAM under a budget computes, the disk holds the rest")
    host = machine.host
    lines.append(
        f"RAM          {format_bytes(host.available_bytes)} available of {format_bytes(host.total_bytes)}, {host.core_count} cores"
    )
    lines.append(f"pinnable     {format_bytes(host.pinnable_bytes)}")
    lines.append(f"disk         {format_bytes(machine.disk_free_bytes)} free in the cache folder")
    return "\n".join(lines)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures and summary.json.")] = Path("demo"),
    only: Annotated[str | None, typer.Option(help="Run one part: smollm2 or flux.")] = None,
) -> None:
    """Run two real models in a third of their own size, and compare with the plain runs."""
    from overflowml_core.cli.demo import run_demo

    raise typer.Exit(run_demo(output, only))
