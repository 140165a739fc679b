"""``overflowml plan --machines``: how many machines a language model takes, and the lines that start it on them. Starts nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from overflowml_core.activations import ASSUMED_TOKENS
from overflowml_core.analytic import ASSUMED_NEW_TOKENS
from overflowml_core.cli.options import Request
from overflowml_core.errors import OverflowmlError

if TYPE_CHECKING:
    from overflowml_core.cli.screen import Screen
    from overflowml_core.facts import Workload
    from overflowml_core.machine import Kind
    from overflowml_core.planner.serving import Serving

_TAKEN = ("source", "dtype", "moe", "batch", "prompt_tokens", "new_tokens")
"""Options of a request that say something of a model that is served."""

_LARGEST_CONFIG_BYTES = 2**20
_PORT = 6379
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def plan_machines(request: Request, path: Path, as_json: bool) -> None:
    """Plan a request for the machines in a file, and print what came of it.

    Raises:
        OverflowmlError: the file or the request is wrong, or the model does not fit.
    """
    from overflowml_core.cli.question import described, workload_of
    from overflowml_core.inspect.machines_file import read_machines
    from overflowml_core.planner.serving import fits_one, plan_serving

    given = [field.name for field in fields(request) if field.name not in _TAKEN and getattr(request, field.name) != field.default]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise OverflowmlError(f"{option} says nothing of several machines; leave it out, or describe them in the file of --machines")
    kinds, asked = read_machines(path), workload_of(request)
    # Of a language model, also where only its size is known.
    workload = replace(asked, prompt_tokens=asked.prompt_tokens or ASSUMED_TOKENS, new_tokens=asked.new_tokens or ASSUMED_NEW_TOKENS)
    network, heads = described(request, workload), heads_of(request.source)
    serving = plan_serving(network, kinds, heads)
    alone = fits_one(network, kinds, heads)
    lines = launch_lines(serving, request.source, workload)
    if as_json:
        machines = [{"name": name, "count": count} for name, count in serving.machines]
        counts = {name: None if way is None else way.machine_count for name, way in alone}
        document = {**asdict(serving), "machines": machines, "alone": counts, "launch": lines}
        typer.echo(json.dumps(document, indent=2))
        return
    from overflowml_core.cli.screen import Screen

    _show(Screen(), serving, kinds, alone, request.source)
    _show_launch(lines)


def heads_of(source: str) -> int | None:
    """Attention heads that the configuration of a local model names; None where there is none to read."""
    try:
        with (Path(source) / "config.json").open("rb") as stream:
            config = json.loads(stream.read(_LARGEST_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    text: Any = config.get("text_config", config) if isinstance(config, dict) else {}
    heads = text.get("num_attention_heads") if isinstance(text, dict) else None
    return heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else None


def launch_lines(serving: Serving, source: str, workload: Workload) -> dict[str, list[str]]:
    """What to type, by where; vLLM's and transformers' own commands.

    Args:
        serving: the plan.
        source: of the model, as the user wrote it; every machine must find it under this name. A bare size has none.
        workload: whose tokens are the longest sequence.
    """
    sizes = [f"--tensor-parallel-size {serving.tensor_parallel}", f"--pipeline-parallel-size {serving.pipeline_parallel}"]
    tokens = (workload.prompt_tokens or 0) + (workload.new_tokens or 0)
    options = [*sizes, f"--max-model-len {tokens}", f"--max-num-seqs {workload.batch}"]
    if serving.offload_gib:
        options.append(f"--cpu-offload-gb {serving.offload_gib}")
    counts = [stage.layers for stage in serving.stages]
    uneven = f"VLLM_PP_LAYER_PARTITION={','.join(map(str, counts))} " if len(counts) > 1 else ""
    named = source if _HUB_ID.fullmatch(source) or Path(source).exists() else "MODEL"
    serve = f"vllm serve {shlex.quote(named)} "
    if serving.machine_count == 1:
        found = {"on the machine": [uneven + serve + " ".join(options)]}
        if serving.pipeline_parallel == 1 and serving.tensor_parallel > 1 and not serving.offload_gib:
            found['or, with from_pretrained(..., tp_plan="auto") in a script of your own'] = [
                f"torchrun --nproc-per-node {serving.tensor_parallel} SCRIPT.py"
            ]
        return found
    return {
        "on the first machine": [f"ray start --head --port={_PORT}"],
        "on each of the others": [f"ray start --address=FIRST_MACHINE:{_PORT}"],
        "then on the first machine": [uneven + serve + " ".join([*options, "--distributed-executor-backend ray"])],
    }


def _show(screen: Screen, serving: Serving, kinds: Sequence[Kind], alone: Sequence[tuple[str, Serving | None]], source: str) -> None:
    from overflowml_core.cli.screen import Column
    from overflowml_core.units import format_bytes, format_seconds

    used = ", ".join(f"{count} x {name}" for name, count in serving.machines)
    screen.heading(f"{source} on several machines")
    screen.text(f"takes {serving.machine_count} of {sum(kind.count for kind in kinds)} machines: {used}")
    screen.text()
    columns = [Column("stage"), Column("machine"), Column("GPUs"), Column("layers"), Column("taken of each GPU"), Column("waits in RAM")]
    rows, first = [], 1
    for number, stage in enumerate(serving.stages, 1):
        gpus = ", ".join(map(str, stage.gpus))
        layers = f"{first} to {first + stage.layers - 1}"
        waiting = format_bytes(stage.offloaded_bytes) if stage.offloaded_bytes else "-"
        rows.append((str(number), f"{stage.machine + 1} ({stage.kind})", gpus, layers, format_bytes(stage.gpu_bytes), waiting))
        first += stage.layers
    screen.table(columns, rows)
    screen.text()
    sources = sorted({kind.machine.rates_of(0).source for kind in kinds})
    if serving.token_s is None:
        screen.text("a token: not known, a rate is missing")
    else:
        rate = 1 / serving.token_s
        screen.text(f"a token of one sequence: {format_seconds(serving.token_s)}, {rate:.3g} tokens/s (rates: {', '.join(sources)})")
    for name, way in alone:
        screen.text(f"{name} alone: {'not enough of them' if way is None else f'{way.machine_count} would do'}")


def _show_launch(lines: dict[str, list[str]]) -> None:
    # As they are, however wide the terminal is: they are to be copied.
    for where, commands in lines.items():
        typer.echo(f"\n{where}:")
        for command in commands:
            typer.echo(f"  {command}")
