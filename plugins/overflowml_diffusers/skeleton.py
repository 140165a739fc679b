"""Pipelines and models out of configuration files alone: built on the meta device, no weights anywhere. Knows nothing of profiles."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overflowml_core.errors import BadLimits, NotAModel
from overflowml_core.inspect import read_json
from overflowml_diffusers.tokenizers import stub_for

DEFAULT_DTYPE = torch.bfloat16
"""What models without weights are taken to be stored in; nearly all pipelines of the last years are."""

_WEIGHTS = re.compile(r"\.safetensors\b|\.(bin|pt|pth|ckpt|msgpack|gguf|onnx)$")
LAYERS_LIMIT = 4096
"""Layers of one kind; a configuration that asks for more would be built for ever. The deepest of today's models have about 130."""

_LAYERS = re.compile(r"layer|depth|blocks|experts")
_PIPELINE_TEXT = re.compile(r"tokenizer|processor|feature_extractor")


def is_config_only(folder: Path, kind: str) -> bool:
    """Whether a pipeline or model folder holds no file of weights at all, of any kind, whole or in parts.

    A model in the folder of a pipeline whose other models have weights has lost its own, and is not meant.

    Args:
        folder: of the pipeline or model.
        kind: "diffusers-pipeline" or "diffusers-model".
    """
    owner = folder if kind == "diffusers-pipeline" else folder.resolve().parent
    places = [folder]
    if (owner / "model_index.json").is_file():
        places += [path for path in owner.iterdir() if path.is_dir()]
    return not any(_WEIGHTS.search(path.name) for place in places for path in place.iterdir())


def build_pipeline(folder: Path, options: dict[str, object]) -> Any:
    """The pipeline of a folder of configurations, its models on the meta device, tokenizers replaced by stubs.

    Args:
        folder: with a model_index.json.
        options: what ``from_pretrained`` would be given: "torch_dtype" (or "dtype"), and components to be used instead of the folder's.

    Raises:
        NotAModel: a class or a configuration is missing or broken.
    """
    import diffusers

    index = read_json(folder / "model_index.json")
    class_name = index.get("_class_name")
    cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise NotAModel(folder, f"model_index.json names the pipeline class {class_name!r}, which this diffusers does not have; update it")
    host: Any = cls
    expected, settings = host._get_signature_keys(host)
    parts: dict[str, Any] = {}
    for name in sorted(expected):
        if name in options:
            parts[name] = options[name]
            continue
        parts[name] = _part(folder, name, index.get(name), options)
    parts.update({name: value for name, value in index.items() if name in settings})
    parts.update({name: value for name, value in options.items() if name in settings})
    for name in parts:
        if parts[name] is None and "tokenizer" in name and name not in options:
            parts[name] = stub_for(name, parts)
    try:
        return host(**parts)
    except Exception as error:
        raise NotAModel(folder, f"diffusers cannot build it ({type(error).__name__}: {_first_line(error)})") from error


def _part(folder: Path, name: str, entry: object, options: dict[str, object]) -> Any:
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        return None
    if _PIPELINE_TEXT.search(name):
        return None
    cls = _class_of(folder, str(entry[0]), str(entry[1]))
    if hasattr(cls, "_from_config"):
        return _transformers_model(cls, folder / name, _dtype(name, options))
    if issubclass(cls, nn.Module):
        return build_model(folder / name, {**options, "torch_dtype": _dtype(name, options)}, cls)
    try:
        return cls.from_pretrained(str(folder), subfolder=name)
    except Exception as error:
        raise NotAModel(folder / name, f"diffusers cannot build it ({type(error).__name__}: {_first_line(error)})") from error


def _class_of(folder: Path, library: str, name: str) -> Any:
    for module in (library, f"diffusers.pipelines.{library}"):
        if not re.fullmatch(r"(diffusers|transformers)(\.\w+)*", module):
            continue  # code of the folder's own, or of a package that nobody named
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type):
                return found
    raise NotAModel(folder, f"model_index.json names {library}.{name}, which neither diffusers nor transformers has; update them")


def _dtype(name: str, options: dict[str, object]) -> torch.dtype:
    asked = options.get("torch_dtype", options.get("dtype"))
    if isinstance(asked, dict):
        asked = asked.get(name, asked.get("default"))
    if isinstance(asked, str) and asked != "auto":
        asked = getattr(torch, asked, asked)
    if asked is None or asked == "auto":
        return DEFAULT_DTYPE
    if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
        raise BadLimits(f"torch_dtype={asked!r}: no dtype of weights; give one such as torch.bfloat16")
    return asked


def build_model(folder: Path, options: dict[str, object], cls: Any = None) -> Any:
    """A diffusers model on the meta device; buffers that its code computes are real, as the host's own loader has them.

    Raises:
        NotAModel: its class or its configuration is broken.
    """
    import diffusers
    from accelerate import init_empty_weights

    config = read_json(folder / "config.json")
    _refuse_endless(folder, config)
    class_name = config.get("_class_name")
    if cls is None:
        cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(cls, type) or not hasattr(cls, "from_config"):
        raise NotAModel(folder, f"config.json names the class {class_name!r}, which this diffusers does not have; update it")
    dtype = _dtype("", options)
    try:
        with default_dtype(dtype), init_empty_weights():
            model = cls.from_config(config)
    except Exception as error:
        raise NotAModel(folder, f"diffusers cannot build it ({type(error).__name__}: {_first_line(error)})") from error
    _keep_in_float32(model, dtype)
    return model.eval()


def _refuse_endless(folder: Path, config: Mapping[str, object]) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            _refuse_endless(folder, value)
        elif isinstance(value, int) and value > LAYERS_LIMIT and _LAYERS.search(name):
            raise NotAModel(folder, f"its config.json asks for {name}={value}, more than the {LAYERS_LIMIT} of any model; correct it")


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """As the host's loader does with modules that lose too much in half precision."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype == torch.float32 or not kept:
        return
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is not None and any(part in name.split(".") for part in kept):
                module._parameters[attribute] = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32), parameter.requires_grad)


def _transformers_model(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    _refuse_endless(folder, read_json(folder / "config.json"))
    try:
        config = cls.config_class.from_pretrained(str(folder))
        with torch.device("meta"):
            return cls._from_config(config, dtype=dtype).eval()
    except Exception as error:
        raise NotAModel(folder, f"transformers cannot build it ({type(error).__name__}: {_first_line(error)})") from error


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
