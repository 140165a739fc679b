"""The places of diffusers that are replaced while the host is installed.

``DiffusionPipeline.from_pretrained`` covers every pipeline class and the auto pipelines; ``ModelMixin.from_pretrained`` single models; in
``ModelMixin._load_pretrained_model`` the finished model and its files are known and nothing is read yet. ``from_single_file`` of both reads
its file and fills its models by functions of the modules around it. Group offloading by its own function knows no method that could be
guarded on an instance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from overflowml_core import session
from overflowml_core.errors import BadCheckpoint, BadLimits, Managed, NotAModel, UnsafeCheckpoint
from overflowml_core.facts import Limits
from overflowml_core.loading import Loading, current, loading
from overflowml_core.patching import Patch, after_import, patch_all
from overflowml_core.quantizers import refuse_quantizer

_patches: list[Patch] = []
_stop_waiting: list[Callable[[], None]] = []


def install() -> None:
    """Patch the host where it is imported, else wait for its import."""
    _stop_waiting.append(after_import("diffusers.pipelines.pipeline_utils", _patch_pipelines))
    _stop_waiting.append(after_import("diffusers.models.modeling_utils", _patch_models))
    _stop_waiting.append(after_import("diffusers.loaders.single_file_utils", _patch_file_reading))
    _stop_waiting.append(after_import("diffusers.loaders.single_file_model", _patch_single_file_models))
    _stop_waiting.append(after_import("diffusers.loaders.single_file", _patch_single_file_pipelines))
    _stop_waiting.append(after_import("diffusers.hooks.group_offloading", _patch_group_offloading))


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


def _patch_file_reading(module: ModuleType) -> None:
    _patches.extend(patch_all([(module, "load_state_dict", _make_read)]))


def _patch_single_file_models(module: ModuleType) -> None:
    owner = module.FromOriginalModelMixin
    places = [(owner, "from_single_file", _maker(_check_single_file, _mapping_files)), (module, "load_model_dict_into_meta", _make_fill)]
    _patches.extend(patch_all([*places, (module, "dispatch_model", _make_dispatch)]))


def _patch_single_file_pipelines(module: ModuleType) -> None:
    _patches.extend(patch_all([(module.FromSingleFileMixin, "from_single_file", _maker(_check_single_file, _mapping_files))]))


def _patch_group_offloading(module: ModuleType) -> None:
    # Not the public function: others have imported that by name.
    _patches.extend(patch_all([(module, "_apply_group_offloading", _make_offload)]))


def _make_offload(function: Any) -> Any:
    @functools.wraps(function)
    def apply_group_offloading(module: Any, *args: Any, **kwargs: Any) -> Any:
        from overflowml_core.runtime.guards import is_guarded

        # Some of its moves go past the module's methods: by streams, and to disk.
        if is_guarded(module):
            raise Managed("model", f"apply_group_offloading({type(module).__name__}, ...)")
        return function(module, *args, **kwargs)

    return apply_group_offloading


def _shows_progress() -> bool:
    """Whether the user left the host's own progress bars on."""
    from diffusers.utils.logging import is_progress_bar_enabled

    return bool(is_progress_bar_enabled())


def _maker(
    check: Callable[[Any, dict[str, Any]], None], within: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[Any], Any]:
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
            check(args[0] if args else next((kwargs[name] for name in _SOURCES if name in kwargs), None), kwargs)
            request = Loading(limits, shows_progress=_shows_progress())
            with loading(request), within():
                loaded = function(cls, *args, **kwargs)
            session.manage(loaded[0] if isinstance(loaded, tuple) else loaded, limits, load=request)
            return loaded

        return classmethod(from_pretrained)

    return make


_SOURCES = ("pretrained_model_name_or_path", "pretrained_model_link_or_path", "pretrained_model_link_or_path_or_dict")
"""What the hosts' functions call the first argument."""


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
        if request is not None:
            refuse_quantizer(kwargs.get("hf_quantizer"), cls.__name__)
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


# ---- from_single_file


def _check_single_file(source: Any, kwargs: dict[str, Any]) -> None:
    from overflowml_diffusers.single_file import check_single_file

    check_single_file(source, kwargs)


def _mapping_files() -> AbstractContextManager[None]:
    from overflowml_diffusers.single_file import mapping_files

    return mapping_files()


def _make_read(function: Any) -> Any:
    @functools.wraps(function)
    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        if current() is None or isinstance(checkpoint_file, dict):
            return function(checkpoint_file, *args, **kwargs)
        from overflowml_diffusers.single_file import read_mapped

        return read_mapped(Path(checkpoint_file))

    return load_state_dict


def _make_fill(function: Any) -> Any:
    @functools.wraps(function)
    def load_model_dict_into_meta(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None:
            return function(model, state_dict, *args, **kwargs)
        from overflowml_diffusers.single_file import leave_unread

        refuse_quantizer(kwargs.get("hf_quantizer"), type(model).__name__)
        keep = kwargs.get("keep_in_fp32_modules") or []
        left = leave_unread(model, state_dict, kwargs.get("dtype"), kwargs.get("hf_quantizer"), keep, request)
        return function(model, left, *args, **kwargs)

    return load_model_dict_into_meta


def _make_dispatch(function: Any) -> Any:
    @functools.wraps(function)
    def dispatch_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        # Weights without data cannot be moved; the plan places the model.
        if current() is not None and any(parameter.is_meta for parameter in model.parameters()):
            return model
        return function(model, *args, **kwargs)

    return dispatch_model
