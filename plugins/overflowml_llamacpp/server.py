"""The arguments of llama-server for a way of running a model. Decides nothing.

Names and meanings by common/arg.cpp of llama.cpp build 11434; builds of September 2025 and later have them all.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overflowml_llamacpp.choice import CPU, Way

BINARY = "llama-server"


@dataclass(frozen=True, slots=True)
class Request:
    """What the arguments hold beside the placement.

    Attributes:
        file: the model, or its first part.
        context_tokens: as asked for.
        threads: for the CPU; None leaves them to llama.cpp.
        devices: accelerators that there are.
    """

    file: Path
    context_tokens: int
    threads: int | None
    devices: int


def arguments(way: Way, request: Request) -> tuple[str, ...]:
    """The arguments, without the name of the program.

    Args:
        way: where everything is.
        request: the rest.
    """
    placement = way.placement
    found = ["-m", str(request.file), "-c", str(request.context_tokens), "-np", "1", "-ngl", str(placement.gpu_layers)]
    if placement.cpu_moe:
        found += ["--n-cpu-moe", str(placement.cpu_moe)]
    if placement.cpu_tensors:
        found += ["-ot", override(placement.cpu_tensors)]
    if placement.cache.name != "f16":
        found += ["-ctk", placement.cache.name, "-ctv", placement.cache.name, "-fa", "on"]
    if request.threads is not None:
        found += ["-t", str(request.threads)]
    if way.kind == CPU and request.devices:
        found += ["-dev", "none"]  # -ngl 0 alone still computes prompts on the device, with a buffer there
    elif way.kind != CPU and request.devices > 1:
        found += ["-sm", "none", "-mg", "0"]
    return tuple(found)


def override(tensors: Sequence[str]) -> str:
    """What ``-ot`` takes to keep experts of one layer on the CPU.

    Args:
        tensors: names such as "blk.3.ffn_up_exps".
    """
    block = tensors[0].rpartition(".ffn_")[0]
    products = "|".join(re.escape(tensor.rpartition(".ffn_")[2]) for tensor in tensors)
    return rf"{re.escape(block)}\.ffn_({products})\.=CPU"


def command(found: Sequence[str]) -> str:
    """A line for a POSIX shell, quoted where it must be."""
    return shlex.join((BINARY, *found))
