"""A transformers model as a network: built by the host's own code on the meta device, so that a folder and the loaded
model give the same facts."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overflowml_core import session
from overflowml_core.activations import language_model_bytes
from overflowml_core.errors import NotAModel, OverflowmlError
from overflowml_core.facts import Component, Limits, Network, Workload, network_fingerprint
from overflowml_core.inspect import find_weights, open_checkpoint
from overflowml_core.loading import Loading, loading
from overflowml_core.quantizers import refuse_quantizer
from overflowml_core.runtime.component import describe_module


def describe_model(model: Any, workload: Workload, name: str = "model", phase: str | None = None) -> Network:
    """Describe a live model; see :func:`component_of`."""
    component = component_of(model, workload, name, phase)
    class_name = type(model).__name__
    return Network((component,), f"a live {class_name}", class_name, network_fingerprint((component,)))


def component_of(model: Any, workload: Workload, name: str, phase: str | None = None) -> Component:
    """A transformers model as one component, with an analytic estimate of its activations.

    Raises:
        Unsupported: it is quantized in a way that cannot be streamed.
    """
    refuse_quantizer(getattr(model, "hf_quantizer", None), type(model).__name__)
    return describe_module(model, name, phase, estimate_activation_bytes(model, workload), "analytic")


@dataclass(frozen=True, slots=True)
class Pattern:
    """What it takes to build a model again: its class, its config, and the dtype of every weight and buffer by name."""

    model_class: Any
    config: Any
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, model: Any) -> Pattern:
        """The pattern of a model, live or on the meta device."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return cls(type(model), model.config, {name: tensor.dtype for name, tensor in named})

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the first weight that holds fractions."""
        return next((dtype.itemsize for dtype in self.dtypes.values() if dtype.is_floating_point), 2)


class _Last(threading.local):
    """The last folder that was described, so that measuring it need not build its model again."""

    key: str = ""
    pattern: Pattern | None = None


_last = _Last()


def describe_folder(folder: Path, workload: Workload, options: dict[str, object]) -> Network:
    """Describe the model in a folder by its config and the headers of its files; by its config alone where it holds no weights.

    Raises:
        NotAModel: the config names no architecture of the installed transformers.
        BadCheckpoint: its files are broken.
    """
    model = build_without_weights(folder, options)
    _last.key, _last.pattern = _key(folder, options), Pattern.of(model)
    network = describe_model(model, workload)
    source = str(folder) if has_weights(folder, options) else f"{folder} (config only)"
    return Network(network.components, source, network.class_name, network.fingerprint)


def pattern_of_folder(folder: Path, options: dict[str, object]) -> Pattern:
    """The pattern of the model in a folder.

    Raises:
        NotAModel, BadCheckpoint: as for :func:`describe_folder`.
    """
    if _last.pattern is not None and _last.key == _key(folder, options):
        return _last.pattern
    return Pattern.of(build_without_weights(folder, options))


def _key(folder: Path, options: dict[str, object]) -> str:
    config = folder / str(options.get("subfolder") or "") / "config.json"
    changed = config.stat().st_mtime_ns if config.is_file() else 0
    return repr((str(folder.absolute()), changed, sorted(options.items(), key=lambda item: item[0])))


def has_weights(folder: Path, options: dict[str, object]) -> bool:
    """Whether a folder holds anything that looks like weights, of any variant or kind."""
    root = folder / str(options.get("subfolder") or "")
    return find_weights(root, options.get("variant")) is not None or any(  # type: ignore[arg-type]
        path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json") for path in root.iterdir()
    )


_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"})


def build_without_weights(folder: Path, options: dict[str, object]) -> Any:
    """The model as ``from_pretrained`` would give it, on the meta device.

    A folder without any weights gives the model of its config, in the dtype of the options, else of the config, else bfloat16.

    Raises:
        NotAModel, BadCheckpoint: as for :func:`describe_folder`.
    """
    import transformers

    options = {name: value for name, value in options.items() if name != "output_loading_info"}
    root = folder / str(options.get("subfolder") or "")
    config_only = root.is_dir() and not has_weights(folder, options)
    if not config_only:
        open_checkpoint(root, variant=options.get("variant"))  # type: ignore[arg-type]
    config = options.pop("config", None)
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(folder, subfolder=options.get("subfolder") or "")
    except Exception as error:  # config classes check what they read, and raise what they like
        first_line = str(error).strip().partition("\n")[0]
        raise NotAModel(folder, f"transformers cannot read its config.json ({first_line})") from error
    architectures = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name, None) for name in architectures), None)
    if model_class is None:
        raise NotAModel(
            folder,
            f"its architecture {architectures or 'is not named in config.json and'} is not in transformers {transformers.__version__}",
        )
    if config_only:
        return _of_config(folder, model_class, config, options)
    try:
        with session.hosts(), loading(Loading(Limits(), describe_only=True)):
            return model_class.from_pretrained(str(folder), config=config, **options)
    except OverflowmlError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise _unbuildable(folder, model_class, error) from error


def _unbuildable(folder: Path, model_class: Any, error: Exception) -> NotAModel:
    return NotAModel(folder, f"{model_class.__name__} cannot be built from its config.json ({type(error).__name__}: {error})")


def _of_config(folder: Path, model_class: Any, config: Any, options: dict[str, object]) -> Any:
    """The model of a config on the meta device, in the dtype that loading it would give, those that stay in float32 included."""
    try:
        dtype = _dtype(options.get("dtype") or options.get("torch_dtype")) or _dtype(getattr(config, "dtype", None)) or torch.bfloat16
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config)).eval()
    except Exception as error:  # a class fails on a config that makes no sense in its own way
        raise _unbuildable(folder, model_class, error) from error
    model.to(dtype)
    # Loading keeps some weights in float32 (modeling_utils: _get_dtype_plan).
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and any(part in f"{path}.{name}" for part in plan):
                parameter.data = parameter.data.to(torch.float32)
    return model


def _dtype(wanted: object) -> torch.dtype | None:
    """A dtype as the hosts accept it: torch's own, or its name; None for "auto" and for nothing.

    Raises:
        ValueError: it is neither; the caller turns it into one of the project's errors.
    """
    if wanted in (None, "auto") or isinstance(wanted, torch.dtype):
        return wanted if isinstance(wanted, torch.dtype) else None
    found = getattr(torch, str(wanted).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={wanted!r} is not a dtype of torch")
    return found


def estimate_activation_bytes(model: Any, workload: Workload) -> int:
    """Peak of activations and KV cache of one forward pass in bytes, from the config alone."""
    generates = bool(getattr(model, "can_generate", lambda: False)())
    return language_model_bytes(model.config, workload, _element_bytes(model), generates)


def _element_bytes(model: Any) -> int:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return 2 if parameter is None else int(parameter.element_size())
