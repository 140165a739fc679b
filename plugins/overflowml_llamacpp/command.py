"""``overflowml llamacpp``: finds what was asked for, has it decided and printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from overflowml_llamacpp.options import CACHES, Asked, takes_asked

if TYPE_CHECKING:
    from overflowml_core.machine import Machine
    from overflowml_llamacpp.answer import Answer
    from overflowml_llamacpp.choice import Way
    from overflowml_llamacpp.model import LlamaModel
    from overflowml_llamacpp.setting import Setting

_DEFAULT_TOKENS = 8192


@takes_asked
def llamacpp(asked: Asked) -> None:
    """Print flags of llama-server and a Modelfile of Ollama for a GGUF model: what fits into the VRAM that is free now, and how fast it is.

    Only headers are read. Example: overflowml llamacpp Qwen3-30B-A3B-Q4_K_M.gguf --ctx 16384 --vram-budget 12GB
    """
    answer = answer_of(asked)
    if asked.as_json:
        typer.echo(answer.to_json())
        return
    from overflowml_core.cli.screen import Screen
    from overflowml_llamacpp.report import show

    show(Screen(), answer)


def answer_of(asked: Asked) -> Answer:
    """Find the model and the machine, and decide.

    Raises:
        BadSize, BadLimits: an option is none.
        BadCheckpoint, NotAModel, Unsupported: the file is none that llama-server answers with.
    """
    from overflowml_core.errors import BadLimits
    from overflowml_core.units import parse_bytes
    from overflowml_llamacpp.answer import Answer
    from overflowml_llamacpp.choice import choose
    from overflowml_llamacpp.memory import padded_tokens
    from overflowml_llamacpp.model import read_model
    from overflowml_llamacpp.modelfile import ollama_of
    from overflowml_llamacpp.server import Request
    from overflowml_llamacpp.setting import setting_of

    if asked.kv not in CACHES:
        raise BadLimits(f"--kv={asked.kv!r}: not one of {', '.join(CACHES)}")
    if asked.ctx is not None:
        padded_tokens(asked.ctx)
    budget_bytes = None if asked.vram_budget is None else parse_bytes(asked.vram_budget, "--vram-budget")
    model = read_model(asked.model)
    machine = _machine(asked)
    tokens = asked.ctx or min(_DEFAULT_TOKENS, model.context_length or _DEFAULT_TOKENS)
    setting = setting_of(machine, budget_bytes)
    choice = choose(model, setting, padded_tokens(tokens), CACHES[asked.kv])
    request = Request(model.files[0], tokens, _threads(asked, machine), max(len(machine.accelerators), int(budget_bytes is not None)))
    doubts = (*_context_warnings(model, tokens), *_disk_warnings(choice.way, setting))
    warnings = (*model.warnings, *doubts, *setting.warnings, *choice.warnings)
    return Answer(model, machine, setting, request, choice, ollama_of(model, choice, request), warnings)


def _machine(asked: Asked) -> Machine:
    from overflowml_core.cli.options import Request
    from overflowml_core.cli.question import machine_of

    return machine_of(Request(source=str(asked.model), gpu=asked.gpu, ram=asked.ram, machine=asked.machine))


def _threads(asked: Asked, machine: Machine) -> int | None:
    """Threads for this machine's CPU; another machine's physical cores are not known here."""
    if asked.machine is not None:
        return None
    from overflowml_llamacpp.threads import physical_cores

    return physical_cores(machine.host.core_count)


def _disk_warnings(way: Way, setting: Setting) -> tuple[str, ...]:
    from overflowml_core.units import format_bytes
    from overflowml_llamacpp.pace import disk_share

    share = disk_share(way.memory, setting)
    if not share:
        return ()
    waiting, there = format_bytes(way.memory.host_weight_bytes), format_bytes(setting.host_bytes)
    return (f"{waiting} of weights wait in RAM, of which {there} are free: {share:.0%} of them come from the disk again for each token",)


def _context_warnings(model: LlamaModel, tokens: int) -> tuple[str, ...]:
    if model.context_length and tokens > model.context_length:
        return (f"--ctx={tokens} is more than the {model.context_length} tokens that the model was trained with; answers get worse beyond",)
    return ()
