"""All that the command answers, put together: the model, the setting, the choice, flags and Modelfile; and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from overflowml_core.machine import Machine
from overflowml_llamacpp.choice import Choice, Way
from overflowml_llamacpp.memory import padded_tokens
from overflowml_llamacpp.model import LlamaModel
from overflowml_llamacpp.modelfile import Ollama
from overflowml_llamacpp.pace import FORMULA, disk_share
from overflowml_llamacpp.server import Request, arguments, command
from overflowml_llamacpp.setting import Setting

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command answers.

    Attributes:
        model: what runs.
        machine: on what.
        setting: what it may take there.
        request: file, context, threads.
        choice: the ways.
        ollama: the nearest that Ollama can be told.
        warnings: what the user should know.
    """

    model: LlamaModel
    machine: Machine
    setting: Setting
    request: Request
    choice: Choice
    ollama: Ollama
    warnings: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of llama-server."""
        return arguments(self.choice.way, self.request)

    @property
    def rates_source(self) -> str:
        """Where the rates of the prediction are from: the less certain of both."""
        memory, device = self.choice.way.memory, self.setting.device_rates
        sources = {self.setting.cpu_rates.source} if memory.host_read_bytes else set()
        if device is not None and memory.device_read_bytes:
            sources.add(device.source)
        return next((word for word in ("assumed", "datasheet", "measured") if word in sources), "assumed")

    def to_json(self) -> str:
        """The answer as JSON; its schema is in docs/llamacpp.md."""
        return json.dumps(_document(self), indent=2)


def _document(answer: Answer) -> dict[str, Any]:
    model, setting, choice = answer.model, answer.setting, answer.choice
    return {
        "schema": SCHEMA,
        "model": {
            "files": [str(file) for file in model.files],
            "architecture": model.architecture,
            "name": model.name,
            "layers": len(model.layers),
            "experts": model.experts[0],
            "experts_per_token": model.experts[1],
            "weight_bytes": model.weight_bytes,
            "context_length": model.context_length,
        },
        "context_tokens": answer.request.context_tokens,
        "padded_context_tokens": padded_tokens(answer.request.context_tokens),
        "budget": {"device_bytes": setting.device_bytes, "host_bytes": setting.host_bytes, "reasons": list(setting.reasons)},
        "chosen": _way(choice.way, answer),
        "ways": [_way(way, answer) for way in choice.ways],
        "refused": [
            {"kind": no.kind, "cache_type": no.cache.name, "needed_bytes": no.needed_bytes, "available_bytes": no.available_bytes}
            for no in choice.refused
        ],
        "prediction": {"formula": FORMULA, "rates": answer.rates_source},
        "llama_server": {"arguments": list(answer.arguments), "command": command(answer.arguments)},
        "ollama": {
            "modelfile": answer.ollama.modelfile,
            "environment": dict(answer.ollama.environment),
            "notes": list(answer.ollama.notes),
        },
        "reasons": list(choice.reasons),
        "warnings": list(answer.warnings),
    }


def _way(way: Way, answer: Answer) -> dict[str, Any]:
    placement, memory = way.placement, way.memory
    return {
        "kind": way.kind,
        "gpu_layers": placement.gpu_layers,
        "n_cpu_moe": placement.cpu_moe,
        "cpu_tensors": list(placement.cpu_tensors),
        "cache_type": placement.cache.name,
        "device_bytes": memory.device_bytes,
        "device_weight_bytes": memory.device_weight_bytes,
        "device_cache_bytes": memory.device_cache_bytes,
        "compute_buffer_bytes_estimate": memory.compute_bytes,
        "device_context_bytes": memory.context_bytes,
        "host_weight_bytes": memory.host_weight_bytes,
        "host_cache_bytes": memory.host_cache_bytes,
        "device_read_bytes_per_token": memory.device_read_bytes,
        "host_read_bytes_per_token": memory.host_read_bytes,
        "disk_share": disk_share(memory, answer.setting),
        "token_s": way.token_s,
        "tokens_per_s": None if not way.token_s else 1 / way.token_s,
        "arguments": list(arguments(way, answer.request)),
    }
