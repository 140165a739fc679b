"""The passes of a transformers model one after another, with inputs as its class and config ask for. Knows nothing of files and plans."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from overflowml_core.activations import ASSUMED_PIXELS, ASSUMED_TEXT_TOKENS, ASSUMED_TOKENS, first_int
from overflowml_core.analytic import ASSUMED_NEW_TOKENS
from overflowml_core.facts import Workload
from overflowml_core.runtime.fake import Tracer
from overflowml_core.runtime.probe import held_bytes, pass_profile
from overflowml_core.work import PassProfile

COMPONENT = "model"
"""The name under which a model that stands alone is watched."""

ASSUMED_IMAGE_PIXELS = 224
"""Height and width of a vision model's image where neither its config nor the workload names one: what most image processors make."""

ASSUMED_SAMPLES = 480_000
"""Samples of a sound where nobody said: 30 seconds at 16 kHz, the window of Whisper's feature extractor."""


class Untraceable(Exception):
    """The model cannot be traced, for the reason in the message; whoever asked falls back to arithmetic."""


def filled_in(workload: Workload, config: Any, generates: bool) -> Workload:
    """The workload with the tokens that are assumed where it names none: never more than the model has positions for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = first_int(text, "max_position_embeddings", "n_positions", "max_seq_len", default=1 << 30)
    if not generates:
        return replace(workload, prompt_tokens=workload.prompt_tokens or min(ASSUMED_TEXT_TOKENS, positions))
    answer = workload.new_tokens or min(ASSUMED_NEW_TOKENS, max(positions // 2, 1))
    longest = positions if getattr(config, "is_encoder_decoder", False) else max(positions - answer, 1)
    return replace(workload, prompt_tokens=workload.prompt_tokens or min(ASSUMED_TOKENS, longest), new_tokens=answer)


def passes(tracer: Tracer, model: Any, workload: Workload) -> Iterator[PassProfile]:
    """Run every kind of pass that the model has at a workload.

    Args:
        tracer: watches the model as ``COMPONENT``.
        model: of transformers, without data.
        workload: its tokens filled in; what else is open is assumed, as the constants of this project say.

    Yields:
        The profiles, in the order in which the passes first happen.

    Raises:
        Untraceable: nobody knows what the model takes, or it keeps no cache where it should.
    """
    if not model.can_generate():
        yield _encode(tracer, model, _inputs(model, model.config, workload))
    elif model.config.is_encoder_decoder:
        yield from _translate(tracer, model, workload)
    else:
        yield from _look(tracer, model, workload)
        yield from _answer(tracer, model, workload)


def _encode(tracer: Tracer, model: Any, inputs: dict[str, torch.Tensor]) -> PassProfile:
    output = model(**inputs)
    del output, inputs
    return pass_profile(tracer.calls[-1], "encode", 1)


def _look(tracer: Tracer, model: Any, workload: Workload) -> Iterator[PassProfile]:
    """The vision tower of a model that answers in words: one image."""
    config = getattr(model.config, "vision_config", None)
    look = getattr(model, "get_image_features", None)
    if config is None or look is None:
        return
    dtype = _dtype_of(model)
    taken = inspect.signature(look).parameters
    if "image_grid_thw" in taken:
        inputs = _patches(config, workload, dtype)
    else:
        inputs = {"pixel_values": _image(config, workload, dtype)}
    try:
        with tracer.calling(COMPONENT, "encode", inputs):
            look(**inputs)
    except Exception:  # noqa: BLE001 -- towers ask for inputs of many kinds; without this pass the answer's are still right
        return
    yield pass_profile(tracer.calls[-1], "encode", 1, note="one image")


def _patches(config: Any, workload: Workload, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An image as Qwen's vision towers take it: rows of flattened patches, and how many there are in time, height and width."""
    patch, merge = first_int(config, "patch_size", default=14), first_int(config, "spatial_merge_size", default=2)
    unit = patch * merge
    rows, columns = ((size or ASSUMED_PIXELS) // unit * merge or merge for size in (workload.height, workload.width))
    features = first_int(config, "in_channels", "in_chans", default=3) * first_int(config, "temporal_patch_size", default=1) * patch * patch
    grid = torch.tensor([[1, rows, columns]] * workload.batch)
    return {"pixel_values": torch.zeros(workload.batch * rows * columns, features, dtype=dtype), "image_grid_thw": grid}


def _answer(tracer: Tracer, model: Any, workload: Workload) -> Iterator[PassProfile]:
    """A decoder: the prompt at once, then token after token; the last one is traced, where the cache is fullest."""
    prompt, answer = workload.prompt_tokens or ASSUMED_TOKENS, workload.new_tokens or ASSUMED_NEW_TOKENS
    only_last = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}
    output = model(input_ids=_tokens(workload.batch, prompt), use_cache=True, **only_last)
    cache = _cache_of(output)
    yield pass_profile(tracer.calls[-1], "prefill", 1, held_bytes(cache))
    if answer == 1:
        return
    # The prompt gives the first token; the last one is never read. So the last pass finds two less than the whole text in the cache.
    if answer > 2:
        del output, cache
        output = model(input_ids=_tokens(workload.batch, prompt + answer - 2), use_cache=True, **only_last)
        cache = _cache_of(output)
    del output
    last = model(input_ids=_tokens(workload.batch, 1), use_cache=True, **{_cache_argument(model): cache}, **only_last)
    del last
    yield pass_profile(tracer.calls[-1], "token", answer - 1, held_bytes(cache))


def _translate(tracer: Tracer, model: Any, workload: Workload) -> Iterator[PassProfile]:
    """An encoder and a decoder: the input once, then token after token from a start token on."""
    encoder = model.get_encoder()
    inputs = _inputs(encoder, model.config, workload)
    with tracer.calling(COMPONENT, "encode", inputs):
        encoded = encoder(**inputs)
    del inputs
    yield pass_profile(tracer.calls[-1], "encode", 1)
    answer = workload.new_tokens or ASSUMED_NEW_TOKENS
    output = model(encoder_outputs=encoded, decoder_input_ids=_tokens(workload.batch, 1), use_cache=True)
    cache = output.past_key_values
    yield pass_profile(tracer.calls[-1], "prefill", 1, held_bytes(cache))
    if answer == 1:
        return
    if answer > 2:
        del output, cache
        output = model(encoder_outputs=encoded, decoder_input_ids=_tokens(workload.batch, answer - 1), use_cache=True)
        cache = output.past_key_values
    del output
    last = model(encoder_outputs=encoded, decoder_input_ids=_tokens(workload.batch, 1), past_key_values=cache, use_cache=True)
    del last
    yield pass_profile(tracer.calls[-1], "token", answer - 1, held_bytes(cache))


# ---- inputs


def _tokens(batch: int, count: int) -> torch.Tensor:
    # Ones: zero is the padding of many models, and padding is masked.
    return torch.ones(batch, count, dtype=torch.long)


def _inputs(model: Any, config: Any, workload: Workload) -> dict[str, torch.Tensor]:
    """Arguments of a model that reads everything at once, by what it says that it takes."""
    kind = getattr(model, "main_input_name", "input_ids")
    dtype, batch = _dtype_of(model), workload.batch
    both = hasattr(config, "text_config") and hasattr(config, "vision_config")
    if kind == "pixel_values":
        return {kind: _image(config, workload, dtype)}
    if kind == "input_features" and first_int(config, "num_mel_bins", default=0):
        frames = first_int(config, "max_source_positions", default=1500) * 2
        return {kind: torch.zeros(batch, config.num_mel_bins, frames, dtype=dtype)}
    if kind == "input_values":
        return {kind: torch.zeros(batch, ASSUMED_SAMPLES, dtype=dtype)}
    if kind != "input_ids":
        raise Untraceable(f"what {type(model).__name__} takes as {kind} is not known here")
    inputs = {kind: _tokens(batch, workload.prompt_tokens or ASSUMED_TEXT_TOKENS)}
    if both and _accepts(model, "pixel_values"):
        inputs["pixel_values"] = _image(config.vision_config, workload, dtype)
    return inputs


def _dtype_of(model: Any) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _image(config: Any, workload: Workload, dtype: torch.dtype) -> torch.Tensor:
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) and len(size) == 2 else (0, 0)
    height = height or workload.height or ASSUMED_IMAGE_PIXELS
    width = width or workload.width or ASSUMED_IMAGE_PIXELS
    return torch.zeros(workload.batch, first_int(config, "num_channels", default=3), height, width, dtype=dtype)


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _cache_argument(model: Any) -> str:
    return next((name for name in ("past_key_values", "cache_params", "state") if _accepts(model, name)), "past_key_values")


def _cache_of(output: Any) -> Any:
    for name in ("past_key_values", "cache_params", "state"):
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    raise Untraceable("it keeps no cache between tokens")
