"""The three places of diffusers that are replaced while the host is installed.

``DiffusionPipeline.from_pretrained`` covers every pipeline class and the auto pipelines; ``ModelMixin.from_pretrained`` single models; in
``ModelMixin._load_pretrained_model`` the finished model and its files are known and nothing is read yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from overflowml_core import session
from overflowml_core.errors import BadCheckpoint, BadLimits, NotAModel, UnsafeCheckpoint
from overflowml_core.facts import Limits
from overflowml_core.loading import Loading, current, loading
from overflowml_core.patching import Patch, after_import, patch_all

_patches: list[Patch] = []
_stop_waiting: list[Callable[[], None]] = []


def install() -> None:
    """Patch the host where it is imported, else wait for its import."""
    _stop_waiting.append(after_import("diffusers.pipelines.pipeline_utils", _patch_pipelines))
    _stop_waiting.append(after_import("diffusers.models.modeling_utils", _patch_models))


def uninstall() -> None:
    """Take all patches back and stop waiting."""
    while _stop_waiting:
        _stop_waiting.pop()()
    while _patches:
        _patches.pop().undo()


def _patch_pipelines(module: ModuleType) -> None:
    _patches.extend(patch_all([(module.DiffusionPipeline, "from_pretrained", _maker(check_pipeline_source))]))


def _patch_models(module: ModuleType) -> None:
    model = module.ModelMixin
    _patches.extend(patch_all([(model, "from_pretrained", _maker(check_model_source)), (model, "_load_pretrained_model", _make_load)]))


def _maker(check: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        function = original.__func__

        @functools.wraps(function)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            overflow = kwargs.pop("overflow", None)
            if overflow is None or overflow is False or current() is not None:
                return function(cls, *args, **kwargs)
            if kwargs.get("device_map") is not None:
                raise BadLimits(
                    f"overflow={overflow!r} and device_map={kwargs['device_map']!r}: give one of them; overflowml places the weights itself"
                )
            limits = Limits.of(overflow)
            check(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
            request = Loading(limits)
            with loading(request):
                loaded = function(cls, *args, **kwargs)
            session.manage(loaded[0] if isinstance(loaded, tuple) else loaded, limits, load=request)
            return loaded

        return classmethod(from_pretrained)

    return make


def check_model_source(source: Any, kwargs: dict[str, Any]) -> None:
    """Look at the files of a local model folder before the host does.

    Raises:
        NotAModel, BadCheckpoint, UnsafeCheckpoint: there is no model, or it is broken, or it is pickle.
    """
    from overflowml_core.inspect import open_checkpoint

    folder = session.local_folder(source)
    if folder is not None:
        open_checkpoint(folder / (kwargs.get("subfolder") or ""), variant=kwargs.get("variant"))


def check_pipeline_source(source: Any, kwargs: dict[str, Any]) -> None:
    """Look at the files of a local pipeline folder before the host does: its index, and the weights of every component that will be loaded.

    Raises:
        NotAModel, BadCheckpoint, UnsafeCheckpoint: there is no pipeline, or a part of it is broken, or it is pickle.
    """
    from overflowml_core.inspect import open_checkpoint, read_json

    folder = session.local_folder(source)
    if folder is None:
        return
    if not (folder / "model_index.json").is_file():
        raise NotAModel(
            folder,
            "a diffusers pipeline folder holds a model_index.json; for a single model use its class, for a language model transformers",
        )
    for name, entry in read_json(folder / "model_index.json").items():
        class_name = _class_of(entry)
        if name.startswith("_") or class_name is None or name in kwargs:
            continue
        part = folder / name
        if not part.is_dir():
            raise BadCheckpoint(
                part, f"model_index.json names a component {name} ({class_name}), and its folder is missing", "copy or download it again"
            )
        if (part / "config.json").is_file() and _holds_weights(part):
            _open_any_variant(part, kwargs.get("variant"), open_checkpoint)


def _class_of(entry: Any) -> str | None:
    """The class in an entry of model_index.json (library and class), None where the entry is a setting or an absent component."""
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return str(entry[1])
    return None


def _holds_weights(part: Path) -> bool:
    # A scheduler or feature extractor may have a config.json too; a model has weights, or should have.
    config_only = ("scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")
    return not any((part / name).is_file() for name in config_only)


def _open_any_variant(part: Path, variant: str | None, open_checkpoint: Callable[..., Any]) -> None:
    # diffusers takes the plain files of a component that has none of the asked variant.
    if variant is not None and not any(f".{variant}." in path.name for path in part.iterdir()):
        variant = None
    open_checkpoint(part, variant=variant)


def _make_load(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def load(cls: type, model: Any, state_dict: Any, resolved_model_file: Any, *args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or kwargs.get("hf_quantizer") is not None or kwargs.get("low_cpu_mem_usage") is False:
            return function(cls, model, state_dict, resolved_model_file, *args, **kwargs)
        pickles = [name for name in resolved_model_file if not str(name).endswith(".safetensors")]
        if pickles:
            raise UnsafeCheckpoint(
                pickles[0], "the weights are pickle, which runs code when it is read", "save them as safetensors with save_pretrained first"
            )
        from overflowml_diffusers.defer import defer_weights

        left = defer_weights(model, state_dict, resolved_model_file, kwargs.get("dtype"), kwargs.get("keep_in_fp32_modules") or [], request)
        return function(cls, model, left, resolved_model_file, *args, **kwargs)

    return classmethod(load)
