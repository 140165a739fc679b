"""Loads the model of a folder by its host under a plan, and runs its real passes on inputs that are made up. The only file of tuning that
knows hosts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overflowml_core.errors import NotAModel, Unsupported
from overflowml_core.facts import Limits, Workload

PROMPT_TOKENS, NEW_TOKENS = 32, 24
"""Of an answer where nobody said: a prefill, and as many tokens as tell one plan from another."""
STEPS = 4
"""Denoising steps where nobody said; every step is measured."""
_STRIDE = 7919
"""A prime, so that the made-up prompt goes through the vocabulary."""

Enough = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Request:
    """What is tuned: a folder, and what its model is loaded with and asked to do. ``workload`` is None where nobody said."""

    folder: Path
    limits: Limits
    workload: Workload | None
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model whose weights are still unread, the load that knows where they are, and what runs its passes until enough of them ran."""

    target: Any
    load: Any
    run: Callable[[Enough], None]


def check_source(folder: Path) -> str:
    """The kind of a folder whose passes can be run here.

    Raises:
        NotAModel: it is none of a model or pipeline.
        Unsupported: it is a part of a pipeline, which nobody knows the inputs of.
    """
    from overflowml_core.inspect import kind_of_folder

    kind = kind_of_folder(folder)
    if kind is None:
        raise NotAModel(folder, "tune runs models: give the folder of a transformers model or of a diffusers pipeline")
    if kind == "diffusers-model":
        raise Unsupported(f"{folder}: a part of a pipeline runs in its pipeline; give the folder that holds model_index.json")
    return kind


def open_subject(request: Request) -> Subject:
    """Have the host make the model, and leave its weights unread.

    Raises:
        NotAModel, BadCheckpoint: the host cannot load it.
        Unsupported: nobody knows what it takes.
    """
    from overflowml_core import session
    from overflowml_core.loading import Loading, loading

    session.install()
    kind = check_source(request.folder)
    load = Loading(request.limits)
    with loading(load):
        target = _language_model(request) if kind == "transformers" else _pipeline(request)
    workload = request.workload or Workload()
    return Subject(target, load, _answers(target, workload) if kind == "transformers" else _pictures(target, workload))


def _language_model(request: Request) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(request.folder)
    names = getattr(config, "architectures", None) or []
    model_class = next((found for found in (getattr(transformers, name, None) for name in names) if found is not None), None)
    if model_class is None:
        raise NotAModel(request.folder, f"its architecture {names or 'is not named in config.json and'} is not in transformers")
    model = model_class.from_pretrained(str(request.folder), config=config, **request.options)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise Unsupported(f"{request.folder}: a {model_class.__name__} takes {model.main_input_name}, and tune makes up token ids alone")
    return model


def _pipeline(request: Request) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(request.folder), **request.options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _answers(model: Any, workload: Workload) -> Callable[[Enough], None]:
    """Greedy answers to a fixed prompt, one after the other; or passes over it, where a model answers nothing."""

    def run(enough: Enough) -> None:
        import torch
        from transformers import GenerationConfig, StoppingCriteria

        class Stop(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
                return torch.full((input_ids.shape[0],), enough(), dtype=torch.bool, device=input_ids.device)

        vocabulary = max(2, int(model.get_input_embeddings().weight.shape[0]))
        count = workload.prompt_tokens or PROMPT_TOKENS
        row = [1 + place * _STRIDE % (vocabulary - 1) for place in range(count)]
        prompt = torch.tensor([row] * workload.batch, device=model.device)
        mask = torch.ones_like(prompt)
        config = GenerationConfig(max_new_tokens=workload.new_tokens or NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=True)
        own = model.generation_config if model.can_generate() else None
        if own is not None and model.config.is_encoder_decoder:
            config.decoder_start_token_id = own.decoder_start_token_id
        with torch.no_grad():
            while not enough():
                if own is not None:
                    model.generate(prompt, attention_mask=mask, generation_config=config, stopping_criteria=[Stop()])
                else:
                    model(input_ids=prompt, attention_mask=mask)

    return run


def _pictures(pipe: Any, workload: Workload) -> Callable[[Enough], None]:
    """Pictures of a pipeline, one after the other, with few steps."""

    def run(enough: Enough) -> None:
        from overflowml_diffusers.inputs import attempts

        ways = [attempt.arguments for attempt in attempts(pipe, replace(workload, steps=workload.steps or STEPS))]
        taken = inspect.signature(type(pipe).__call__).parameters
        while not enough():
            for place, arguments in enumerate(ways):
                more = {"callback_on_step_end": _stopper(enough)} if "callback_on_step_end" in taken else {}
                try:
                    pipe(**arguments, **more)
                except (TypeError, ValueError):
                    # Pipelines ask for inputs of many kinds; the last way says what is missing.
                    if place == len(ways) - 1:
                        raise
                    continue
                ways = [arguments]
                break

    return run


def _stopper(enough: Enough) -> Callable[..., dict[str, Any]]:
    def after_step(pipe: Any, step: int, time: object, values: dict[str, Any]) -> dict[str, Any]:
        if enough():
            pipe._interrupt = True  # what remains of the picture is skipped
        return values

    return after_step
