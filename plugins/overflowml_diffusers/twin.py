"""Twins of pipelines and modules: the same code and settings over fake weights, to be run without data. The originals are only read."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from overflowml_core.runtime.fake import REAL_ELEMENTS, is_fake
from overflowml_core.runtime.parts import decoded_shape
from overflowml_diffusers.tokenizers import stub_for


class CannotCopy(Exception):
    """A module that cannot be copied without its weights, with the reason in words."""


def twin_module(module: nn.Module) -> Any:
    """A copy of a module inside a tracing: everything but the weights, which are fake and of the same shapes and dtypes.

    Raises:
        CannotCopy: something in it cannot be copied, or hooks of another library would run with it.
    """
    for path, inner in module.named_modules():
        if hasattr(inner, "_hf_hook") or hasattr(inner, "_diffusers_hook"):
            raise CannotCopy(f"{path or type(module).__name__} has hooks of another offloading; remove them first")
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for parameter in inner._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_decoded(parameter), requires_grad=False)
        for buffer in inner._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _small_or_empty(buffer, "meta")
        for tensor in _loose_tensors(inner):
            if id(tensor) not in memo:
                memo[id(tensor)] = _small_or_empty(tensor, "cpu")
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise CannotCopy(f"{type(module).__name__} cannot be copied ({type(error).__name__})") from error


def _small_or_empty(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy in RAM where a trace computes with its values, else a tensor of the same shape without data."""
    if tensor.is_meta or tensor.numel() > REAL_ELEMENTS:
        return _without_data(tensor, device)
    return tensor.detach().to("cpu", copy=True)


def _without_data(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def _decoded(parameter: nn.Parameter) -> torch.Tensor:
    """A weight without data; one that is packed as its layer computes with it, for what decodes it reads its bytes."""
    if decoded_shape(parameter) == tuple(parameter.shape):
        return _without_data(parameter, "meta")
    return torch.empty(decoded_shape(parameter), dtype=torch.float16, device="meta")


def _loose_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that a module keeps beside its parameters and buffers, as some do with tables of positions."""
    for value in vars(module).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, torch.Tensor))


class RealMasks(TorchFunctionMode):  # type: ignore[misc]
    """Indexing by a mask whose values are known has a known shape; without this, a fake tensor refuses every mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the places that a mask names in place of the mask."""
        if func is torch.Tensor.__getitem__ and is_fake(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            places: list[Any] = []
            for item in index:
                if isinstance(item, torch.Tensor) and item.dtype is torch.bool and not is_fake(item):
                    places += item.nonzero(as_tuple=True)
                else:
                    places.append(item)
            args = (args[0], tuple(places))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The hosts' remarks are kept back meanwhile: they would be about a run that nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Progress:
    """A progress bar that shows nothing."""

    def __init__(self, iterable: Any = None) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def update(self, steps: int = 1) -> None:
        """A step is done."""

    def set_postfix(self, *args: object, **kwargs: object) -> None:
        """Words beside the bar."""


_STEPS_UNTIL_SETTLED = 6
"""Steps after which a scheduler holds all that it will ever hold: the longest histories, of PNDM and IPNDM, are of four outputs."""


def _settle(scheduler: Any) -> None:
    """Have a scheduler count its later steps only: what it computes is not asked for, what it holds does not change any more."""
    if getattr(scheduler, "order", 1) != 1 or not hasattr(scheduler, "_step_index"):
        return
    step, done = scheduler.step, [0]

    def counted(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        if done[0] <= _STEPS_UNTIL_SETTLED or kwargs.get("return_dict", True) or scheduler._step_index is None:
            return step(model_output, timestep, sample, *args, **kwargs)
        scheduler._step_index += 1
        return (torch.empty_like(sample),)

    vars(scheduler)["step"] = counted


def twin_pipeline(pipe: Any, prompt_tokens: int | None) -> Any:
    """A copy of a pipeline inside a tracing: twins of its modules, a new scheduler of the same configuration, stubs for tokenizers, no
    safety checker, no progress bar.

    Args:
        pipe: only read.
        prompt_tokens: length of a prompt where the pipeline does not pad it.

    Raises:
        CannotCopy: see :func:`twin_module`.
    """
    parts = dict(pipe.components)
    twin = copy.copy(pipe)
    twins: dict[int, Any] = {}
    own = vars(twin)
    for name, part in parts.items():
        if "tokenizer" in name:
            own[name] = stub_for(name, parts, prompt_tokens)
        elif isinstance(part, nn.Module):
            if id(part) not in twins:
                twins[id(part)] = twin_module(part)
            own[name] = twins[id(part)]
        elif hasattr(part, "set_timesteps"):
            own[name] = type(part).from_config(part.config)
            _settle(own[name])
    if "safety_checker" in own:
        own["safety_checker"] = None  # it looks at pixels, and there are none
    own["progress_bar"] = lambda iterable=None, total=None: Progress(iterable)
    own["maybe_free_model_hooks"] = lambda: None
    return twin
