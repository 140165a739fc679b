"""What a source given as text or number means: a folder, a file, a size, or a repository on the Hub. Loads nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from overflowml_core.errors import NotAModel
from overflowml_core.facts import Network, Workload

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96}){1,3}(@[\w./-]{1,100})?", re.ASCII)
_SIZE_LIKE = re.compile(r"\s*[-+]?([0-9.,]+([eE][-+]?[0-9]+)?\s*[A-Za-z]{0,5}|nan|inf|infinity)\s*", re.ASCII | re.IGNORECASE)
_WAYS = "give a folder, a .gguf or .safetensors file, a Hub id such as owner/name, or a size such as 40GB"

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes in which hosts load, by the names that safetensors gives them. Weights in any other are loaded as the configuration says."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder to describe.

    Attributes:
        folder: where the configuration is.
        name: what people call the source, None for the folder itself.
        dtypes: names of torch's dtypes by component ("model" for a model that stands alone), where something beside the folder tells them.
        weight_bytes: of all weights by their headers, where these lie somewhere else; None where the folder tells.
    """

    folder: Path
    name: str | None = None
    dtypes: dict[str, str] = field(default_factory=dict)
    weight_bytes: int | None = None


def of_text(source: str | os.PathLike[str] | float, workload: Workload, cache_folder: Path) -> Network | Place:
    """What a source given as text or number means.

    What exists as a path is a path; else what looks like a size is a size, and what looks like a Hub id is one.

    Args:
        source: a path, a size, or the id of a repository on the Hub.
        workload: what a network without a model's code is profiled for.
        cache_folder: where descriptions from the Hub are kept.

    Raises:
        NotAModel: it is none of these.
        BadSize, BadCheckpoint: it is one of them, and wrong.
        OverflowmlError: the Hub cannot be reached.
    """
    path = _path(source)
    if path is not None and _exists(path):
        return _of_path(path, workload)
    if _is_size(source):
        from overflowml_core.bare import bare_network, source_size

        return bare_network(source_size(source), workload)
    if isinstance(source, str) and _is_hub_id(source):
        return _of_hub(source, cache_folder)
    raise NotAModel(source, f"there is no such path, and it is no size; {_WAYS}")


def is_loadable(source: str | os.PathLike[str] | float) -> bool:
    """Whether a host loads what this means by ``from_pretrained``: a folder with a configuration, or a repository."""
    path = _path(source)
    if path is not None and _exists(path):
        return path.is_dir() and any((path / name).is_file() for name in ("config.json", "model_index.json"))
    return isinstance(source, str) and not _is_size(source)


def weight_files(source: object) -> list[Path]:
    """The files that hold the weights of a source that is a path, the largest first; none of any other."""
    path = _path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is None or not _exists(path):
        return []
    found = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
    return sorted((file for file in found if file.is_file()), key=lambda file: (-file.stat().st_size, file))


def _path(source: str | os.PathLike[str] | float) -> Path | None:
    return Path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) and os.fspath(source) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL character
        return False


def _is_size(source: object) -> bool:
    return isinstance(source, (int, float)) or (isinstance(source, str) and _SIZE_LIKE.fullmatch(source) is not None)


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and ".." not in source and not source.endswith((".gguf", ".safetensors", ".json"))


def _of_path(path: Path, workload: Workload) -> Network | Place:
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "model_index.json")):
            from overflowml_core.inspect.single_file import network_of_weights

            network = network_of_weights(path, workload)
            if network is not None:
                return network
        return Place(path)
    from overflowml_core.inspect.gguf_network import is_gguf, network_of_gguf
    from overflowml_core.inspect.single_file import network_of_file

    if path.suffix == ".gguf" or is_gguf(path):
        return network_of_gguf(path, workload)
    if path.suffix == ".safetensors":
        return network_of_file(path, workload)
    raise NotAModel(path, f"this file is neither GGUF nor safetensors; {_WAYS}")


def _of_hub(source: str, cache_folder: Path) -> Place:
    from overflowml_core.inspect.hub import fetch_description, split_hub_id

    repo_id, revision, subfolder = split_hub_id(source)
    found = fetch_description(repo_id, revision, cache_folder, subfolder)
    dtypes = {name: _TORCH_NAMES[dtype] for name, dtype in found.dtype_by_component.items() if dtype in _TORCH_NAMES}
    return Place(found.folder, source, dtypes, sum(found.weight_bytes_by_component.values()))


def check_path(path: Path) -> None:
    """Refuse a path that leads to no folder.

    Raises:
        NotAModel: always, unless it is a folder.
    """
    if not path.exists():
        raise NotAModel(path, "the path does not exist; give the folder of a model")
    if path.is_file():
        raise NotAModel(path, "this is a file; give the folder that holds config.json or model_index.json")
