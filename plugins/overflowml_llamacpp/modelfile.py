"""A Modelfile of Ollama for a way of running a model, and what Ollama has no parameter for. Decides nothing.

Parameters by ``Runner`` in api/types.go of Ollama: num_ctx, num_batch, num_gpu, main_gpu, use_mmap, num_thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overflowml_core.errors import OverflowmlError
from overflowml_llamacpp.choice import EXPERTS, PART, Choice
from overflowml_llamacpp.memory import padded_tokens
from overflowml_llamacpp.model import LlamaModel
from overflowml_llamacpp.server import Request


@dataclass(frozen=True, slots=True)
class Ollama:
    """What to give to Ollama.

    Attributes:
        modelfile: the text of a Modelfile.
        environment: variables of the server, by name; they hold for all of its models.
        notes: what it has no parameter for.
    """

    modelfile: str
    environment: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def ollama_of(model: LlamaModel, choice: Choice, request: Request) -> Ollama:
    """The nearest that Ollama can be told.

    Args:
        model: what runs.
        choice: with the best way that needs whole layers alone.
        request: file, context and threads.

    Raises:
        OverflowmlError: the file's path cannot stand in a Modelfile.
    """
    path, way = request.file.absolute(), choice.whole_layers
    if not str(path).isprintable() or '"' in str(path):
        raise OverflowmlError(f"{str(path)!r}: a Modelfile has a path on one line, without quotes; rename the file or its folder")
    lines = [f"FROM {path}", f"PARAMETER num_ctx {request.context_tokens}", f"PARAMETER num_gpu {way.placement.gpu_layers}"]
    if request.threads is not None:
        lines.append(f"PARAMETER num_thread {request.threads}")
    environment = [("OLLAMA_NUM_PARALLEL", "1")]
    if way.placement.cache.name != "f16":
        environment += [("OLLAMA_FLASH_ATTENTION", "1"), ("OLLAMA_KV_CACHE_TYPE", way.placement.cache.name)]
    return Ollama("\n".join(lines) + "\n", tuple(environment), tuple(_notes(model, choice, request)))


def _notes(model: LlamaModel, choice: Choice, request: Request) -> Iterator[str]:
    if choice.way.kind in (EXPERTS, PART):
        slower = ""
        if choice.way.token_s and choice.whole_layers.token_s:
            slower = f", {choice.whole_layers.token_s / choice.way.token_s:.2f} times the time of llama-server's flags a token"
        yield f"Ollama has no parameter for --n-cpu-moe and -ot: num_gpu counts whole layers, with their experts{slower}"
    if choice.way.placement.cache.name != "f16":
        yield "Ollama takes the cache's type from the server's environment, for all models together, not from a Modelfile"
    if len(model.files) > 1:
        yield (
            f"Ollama imports no model in parts (ollama issue 5245): join the {len(model.files)} files with 'llama-gguf-split --merge' and "
            "name the result after FROM"
        )
    if padded_tokens(request.context_tokens) != request.context_tokens:
        yield f"llama.cpp rounds the context up to {padded_tokens(request.context_tokens)} tokens"
