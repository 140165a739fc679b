"""Prints the answer for people: the ways in a table, flags, Modelfile, reasons. Decides nothing."""

from __future__ import annotations

from overflowml_core.cli.screen import Column, Screen
from overflowml_core.cli.words import hardware_words
from overflowml_core.units import format_bytes
from overflowml_llamacpp.answer import Answer
from overflowml_llamacpp.choice import ALL, CPU, EXPERTS, LAYERS, PART, Way
from overflowml_llamacpp.pace import FORMULA, disk_share
from overflowml_llamacpp.server import command

_RECOMMENDED = "<- recommended"
_LEAST = {ALL: "everything on the device", EXPERTS: "all layers, their experts on the CPU", LAYERS: "the output layer alone on the device"}


def show(screen: Screen, answer: Answer) -> None:
    """Print all of it."""
    model, memory = answer.model, answer.choice.way.memory
    screen.paragraph(f"Hardware: {hardware_words(answer.machine)}", hanging="  ")
    screen.paragraph(f"Model: {_model_words(answer)}", hanging="  ")
    for reason in answer.setting.reasons:
        screen.paragraph(f"Budget: {reason.removeprefix('budget of ')}", hanging="  ")
    screen.text()
    _show_ways(screen, answer)
    if memory.device_bytes:
        parts = [
            f"weights {format_bytes(memory.device_weight_bytes)}",
            f"cache {format_bytes(memory.device_cache_bytes)}",
            f"compute buffer {format_bytes(memory.compute_bytes)} (an estimate)",
        ]
        parts += [f"context of the driver {format_bytes(memory.context_bytes)}"] if memory.context_bytes else []
        screen.paragraph(f"Of the device: {', '.join(parts)}.", hanging="  ")
    if answer.choice.way.token_s is None:
        screen.paragraph("No prediction: how fast the device reads its memory is not known.", hanging="  ", style="dim")
    else:
        screen.paragraph(
            f"Predicted for one conversation at half its context, with {answer.rates_source} rates: a token takes {FORMULA}.",
            hanging="  ",
            style="dim",
        )
    screen.text()
    screen.heading("llama-server")
    screen.text(command(answer.arguments))
    screen.text()
    _show_ollama(screen, answer)
    screen.heading("Reasoning")
    for reason in answer.choice.reasons:
        screen.paragraph(reason, "  ", "  ")
    for warning in answer.warnings:
        screen.paragraph(f"Warning: {warning}", "  ", "  ", style="yellow")
    if len(model.files) > 1:
        screen.paragraph(f"llama-server finds the other {len(model.files) - 1} parts by the name of the first", "  ", "  ")


def _model_words(answer: Answer) -> str:
    model = answer.model
    count, per_token = model.experts
    return ", ".join(
        filter(
            None,
            (
                f"{model.name or model.files[0].name} ({model.architecture})",
                f"{len(model.layers)} layers",
                f"{count} experts, {per_token} a token" if count else "",
                f"{format_bytes(model.weight_bytes)} of weights",
                f"context {answer.request.context_tokens} of {model.context_length}",
            ),
        )
    )


def _show_ways(screen: Screen, answer: Answer) -> None:
    columns = [
        Column("#", figures=True),
        Column("Way", style="bold"),
        Column("Cache"),
        Column("Est VRAM", figures=True),
        Column("RAM", figures=True),
        Column("Answers", figures=True),
    ]
    screen.heading("Ways that fit")
    ways = answer.choice.ways
    rows = [(str(i), *_cells(way)) for i, way in enumerate(ways, 1)]
    screen.table(columns, rows, [_mark(way, answer) for way in ways])
    for no in answer.choice.refused:
        needs = f"{format_bytes(no.needed_bytes)} of {format_bytes(no.available_bytes)}"
        screen.paragraph(f"Rejected: {_LEAST[no.kind]}, cache {no.cache.name}: needs {needs}", hanging="  ")


def way_words(way: Way) -> str:
    """A way by the flags that make it."""
    placement = way.placement
    words = {
        ALL: f"everything on the device (-ngl {placement.gpu_layers})",
        EXPERTS: f"-ngl {placement.gpu_layers} --n-cpu-moe {placement.cpu_moe}",
        PART: f"-ngl {placement.gpu_layers} --n-cpu-moe {placement.cpu_moe} -ot, part of a layer",
        LAYERS: f"-ngl {placement.gpu_layers}, whole layers",
        CPU: "the CPU alone (-ngl 0)",
    }
    return words[way.kind]


def _cells(way: Way) -> tuple[str, ...]:
    memory = way.memory
    vram = format_bytes(memory.device_bytes) if memory.device_bytes else "none"
    speed = "?" if not way.token_s else f"{1 / way.token_s:.{0 if way.token_s < 0.01 else 1}f} tokens/s"
    return way_words(way), way.placement.cache.name, vram, format_bytes(memory.host_weight_bytes + memory.host_cache_bytes), speed


def _mark(way: Way, answer: Answer) -> str:
    if way == answer.choice.way:
        return _RECOMMENDED
    return "(reads the disk for each token)" if disk_share(way.memory, answer.setting) else ""


def _show_ollama(screen: Screen, answer: Answer) -> None:
    screen.heading("Ollama: Modelfile")
    for line in answer.ollama.modelfile.splitlines():
        screen.text(line)
    screen.text()
    variables = " ".join(f"{name}={value}" for name, value in answer.ollama.environment)
    screen.paragraph(f"Environment of the server: {variables}", hanging="  ")
    for note in answer.ollama.notes:
        screen.paragraph(f"Note: {note}", hanging="  ")
    screen.text()
