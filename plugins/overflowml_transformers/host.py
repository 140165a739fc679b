"""The two places of transformers that are replaced while the host is installed, and the factory ``pipeline``.

``PreTrainedModel.from_pretrained`` takes the request out of the arguments. ``PreTrainedModel._load_pretrained_model`` is
the one point where the finished model, its files and the host's own renaming of keys are known and nothing is read yet:
there weights that lie in files as they are used are left unread, and the rest is loaded by the host as always.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overflowml_core import session
from overflowml_core.errors import BadLimits, UnsafeCheckpoint
from overflowml_core.facts import Limits
from overflowml_core.loading import Loading, current, loading
from overflowml_core.patching import Patch, after_import, patch_all
from overflowml_core.quantizers import refuse_quantizer
from overflowml_transformers.experts import register, unregister

DEVICE_MAP = "overflowml"
_EXPERTS = "transformers.integrations.moe"
_patches: list[Patch] = []
_stop_waiting: list[Callable[[], None]] = []


def install() -> None:
    """Patch the host where it is imported, else wait for its import."""
    _stop_waiting.append(after_import("transformers.modeling_utils", _patch_models))
    _stop_waiting.append(after_import("transformers.pipelines", _patch_pipelines))
    _stop_waiting.append(after_import(_EXPERTS, register))


def uninstall() -> None:
    """Take all patches back and stop waiting."""
    while _stop_waiting:
        _stop_waiting.pop()()
    if _EXPERTS in sys.modules:
        unregister(sys.modules[_EXPERTS])
    replaced = [patch.replacement for patch in _patches]
    while _patches:
        _patches.pop().undo()
    package, module = sys.modules.get("transformers"), sys.modules.get("transformers.pipelines")
    # Handed out while ours was in its place, and kept by the package since.
    if package is not None and module is not None and any(vars(package).get("pipeline") is ours for ours in replaced):
        package.pipeline = module.pipeline  # type: ignore[attr-defined]


def _patch_models(module: ModuleType) -> None:
    model = module.PreTrainedModel
    _patches.extend(patch_all([(model, "from_pretrained", _make_from_pretrained), (model, "_load_pretrained_model", _make_load)]))


def _patch_pipelines(module: ModuleType) -> None:
    import transformers

    _patches.extend(patch_all([(module, "pipeline", _make_pipeline), (module.Pipeline, "__init__", _make_pipeline_init)]))
    # transformers hands out lazily what its submodules define; if it has done so already, it keeps the old function.
    if "pipeline" in vars(transformers):
        _patches.append(Patch(transformers, "pipeline", lambda _: module.pipeline))


def _make_from_pretrained(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        limits = take_request(kwargs)
        if limits is None or current() is not None:
            return function(cls, *args, **kwargs)
        check_source(args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        request = Loading(limits, shows_progress=_shows_progress())
        with loading(request):
            loaded = function(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        session.manage(model, limits, load=request)
        return loaded

    return classmethod(from_pretrained)


def _shows_progress() -> bool:
    """Whether the user left the host's own progress bars on."""
    from transformers.utils.logging import is_progress_bar_enabled

    return bool(is_progress_bar_enabled())


def take_request(kwargs: dict[str, Any]) -> Limits | None:
    """Take ``overflow=``, ``device_map="overflowml"`` and ``max_memory=`` out of the arguments of a load.

    Returns:
        What the user grants, None where the load is not for us.

    Raises:
        BadLimits, BadSize: the request contradicts itself or cannot be read.
    """
    overflow = kwargs.pop("overflow", None)
    device_map = kwargs.get("device_map")
    by_map = isinstance(device_map, str) and device_map.partition(":")[0] == DEVICE_MAP
    if overflow is None or overflow is False:
        if not by_map:
            return None
        overflow = device_map.partition(":")[2] or True  # type: ignore[union-attr]
    elif device_map is not None and not by_map:
        raise BadLimits(f"overflow={overflow!r} and device_map={device_map!r}: give one of them; overflowml makes the device map itself")
    limits = Limits.of(overflow)
    kwargs.pop("device_map", None)
    max_memory = kwargs.pop("max_memory", None)
    return limits if max_memory is None else _with_max_memory(limits, max_memory)


def _with_max_memory(limits: Limits, max_memory: Any) -> Limits:
    if not isinstance(max_memory, dict):
        raise BadLimits(f"max_memory={max_memory!r}: give a mapping such as {{0: '8GB', 'cpu': '32GB'}}")
    device = [size for key, size in max_memory.items() if key not in ("cpu", "disk")]
    if len(device) > 1:
        raise BadLimits(f"max_memory={max_memory!r}: this version runs a model on one accelerator; give a size for one")
    return Limits(
        device_memory=limits.device_memory if limits.device_memory is not None or not device else device[0],
        host_memory=limits.host_memory if limits.host_memory is not None else max_memory.get("cpu"),
        reserve=limits.reserve,
        allow_disk=limits.allow_disk,
        quality=limits.quality,
        excluded=limits.excluded,
    )


def check_source(source: Any, kwargs: dict[str, Any]) -> None:
    """Look at the files of a local folder before the host does, for errors that name the file and the way out.

    Raises:
        NotAModel, BadCheckpoint, UnsafeCheckpoint: there is no model, or it is broken, or it is pickle.
    """
    from overflowml_core.inspect import open_checkpoint

    folder = session.local_folder(source)
    if folder is None or kwargs.get("gguf_file") or kwargs.get("state_dict") is not None or (folder / "adapter_config.json").exists():
        return
    open_checkpoint(folder / (kwargs.get("subfolder") or ""), variant=kwargs.get("variant"))


def _make_load(original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is not None:
            refuse_quantizer(load_config.hf_quantizer, type(model).__name__)
        if request is None or state_dict is not None or not checkpoint_files or load_config.hf_quantizer is not None:
            return function(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        pickles = [name for name in checkpoint_files if not str(name).endswith(".safetensors")]
        if pickles:
            raise UnsafeCheckpoint(
                pickles[0], "the weights are pickle, which runs code when it is read", "save them as safetensors with save_pretrained first"
            )
        from overflowml_transformers.defer import defer_weights

        deferred, left = defer_weights(model, checkpoint_files, load_config, request)
        result = function(model, left, checkpoint_files, load_config, *args, **kwargs)
        result[0].missing_keys.difference_update(deferred)
        return result

    return staticmethod(load)


def _make_pipeline(original: Any) -> Any:
    @functools.wraps(original)
    def pipeline(*args: Any, **kwargs: Any) -> Any:
        # The package keeps what it handed out, so this may be called after uninstall.
        overflow = kwargs.pop("overflow", None) if _stop_waiting else None
        if overflow is not None and overflow is not False:
            if isinstance(kwargs.get("model", args[1] if len(args) > 1 else None), (str, type(None))):
                kwargs["model_kwargs"] = {**(kwargs.get("model_kwargs") or {}), "overflow": Limits.of(overflow)}
            else:
                kwargs["overflow"] = overflow  # a live model: Pipeline.__init__ sees to it
        return original(*args, **kwargs)

    return pipeline


def _make_pipeline_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        # Reached with the request still in it when the factory was imported by name before it was patched, or with a live model.
        overflow = kwargs.pop("overflow", None)
        if overflow is not None and overflow is not False and session.attachment(model) is None:
            session.manage(model, Limits.of(overflow))
        original(self, model, *args, **kwargs)

    return __init__
