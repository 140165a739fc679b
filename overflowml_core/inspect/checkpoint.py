"""Finds the safetensors files of a model in a folder and says which tensor lies where. Knows nothing of the model's code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, cast

from overflowml_core.errors import BadCheckpoint, NotAModel, UnsafeCheckpoint
from overflowml_core.inspect.safetensors import TensorEntry, read_header

FolderKind: TypeAlias = Literal["diffusers-pipeline", "diffusers-model", "transformers"]

JSON_LIMIT_BYTES = 16 * 2**20
INDEX_LIMIT_BYTES = 128 * 2**20
"""An index spends about 110 bytes on a tensor, and the largest mixtures of experts have over 200 000 (Kimi-K2 in 4 bits), so
that the limit for other JSON files would refuse real models."""

_TRANSFORMERS_STEM = "model"
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLES_WITHOUT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # what a trainer leaves beside the weights
_SHOWN_NAMES = 3
_QUOTED_CHARS = 120


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor and the file that holds it."""

    path: Path
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of one model.

    Attributes:
        folder: where its files are.
        files: sorted by name, as the hosts load them.
        tensors: by name, over all files.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Located]


def kind_of_folder(path: str | os.PathLike[str]) -> FolderKind | None:
    """Which library wrote a folder, by its configuration files; None where none of them did.

    Args:
        path: the folder; it may be missing.

    Raises:
        BadCheckpoint: a configuration file is there and cannot be read.
    """
    folder = Path(path)
    if os.path.isfile(folder / "model_index.json"):
        return "diffusers-pipeline"
    if not os.path.isfile(folder / "config.json"):
        return None
    config = read_json(folder / "config.json")
    if "_class_name" in config:
        return "diffusers-model"
    return "transformers" if "architectures" in config or "model_type" in config else None


def open_checkpoint(folder: str | os.PathLike[str], variant: str | None = None) -> Checkpoint:
    """Find the weights of a model in the folder where transformers or diffusers saved it, and check every header.

    Args:
        folder: of one model; for a pipeline, the folder of one component.
        variant: as the hosts call it ("fp16"): the word before the file name's last suffix.

    Raises:
        NotAModel: there is no such folder, or no weights of this variant in it.
        UnsafeCheckpoint: there are weights, but only as pickle.
        BadCheckpoint: a file is missing, damaged, or not what the index says.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        looked_for = (
            "it is a file: give the folder that holds it"
            if os.path.isfile(root)
            else "there is no such folder: correct the path or download the model"
        )
        raise NotAModel(root, looked_for)
    entry = find_weights(root, variant)
    if entry is None:
        raise _nothing_found(root, variant)
    if entry.suffix != ".json":
        return checkpoint_of_files([entry])
    return _open_sharded(entry)


def find_weights(folder: str | os.PathLike[str], variant: str | None = None) -> Path | None:
    """The file from which a host would start to load: a single safetensors file, or the index of several; None without one.

    Where both are there, transformers takes the single file and diffusers the index (read in transformers 5.23,
    modeling_utils.py ``_get_resolved_checkpoint_files``, and diffusers 0.42, modeling_utils.py ``from_pretrained``), and so
    does this. A configuration's ``transformers_weights`` comes first, as in transformers.

    Args:
        folder: of one model.
        variant: as for :func:`open_checkpoint`.

    Raises:
        BadCheckpoint: the configuration cannot be read, or names a file outside the folder.
    """
    root = Path(folder)
    kind = kind_of_folder(root)
    if kind == "diffusers-pipeline":
        return None
    if kind == "transformers":
        named = read_json(root / "config.json").get("transformers_weights")
        if named is not None:
            return root / _plain_name(root / "config.json", named)
    names: list[str] = []
    if kind != "diffusers-model":
        names += [_single(_TRANSFORMERS_STEM, variant), *_indexes(_TRANSFORMERS_STEM, variant)]
    if kind != "transformers":
        names += [*_indexes(_DIFFUSERS_STEM, variant), _single(_DIFFUSERS_STEM, variant)]
    return next((root / name for name in names if os.path.isfile(root / name)), None)


def checkpoint_of_files(files: Iterable[str | os.PathLike[str]]) -> Checkpoint:
    """Take several safetensors files as one model.

    Args:
        files: at least one, in any order.

    Raises:
        NotAModel: there is no file among them.
        BadCheckpoint: a file is damaged, or a tensor is in two of them.
    """
    paths = tuple(sorted({Path(file) for file in files}))
    if not paths:
        raise NotAModel("an empty list of files", "give at least one *.safetensors file")
    tensors: dict[str, Located] = {}
    for path in paths:
        for entry in read_header(path).tensors:
            other = tensors.get(entry.name)
            if other is not None:
                raise BadCheckpoint(path, f"tensor {_quote(entry.name)} is in {other.path.name} too", "leave one of the two files out")
            tensors[entry.name] = Located(path, entry)
    return Checkpoint(folder=paths[0].parent, files=paths, tensors=MappingProxyType(tensors))


def read_json(path: str | os.PathLike[str], limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, object]:
    """Read a JSON file that holds an object, as the hosts read it (NaN and Infinity are numbers, a later key wins).

    Args:
        path: the file.
        limit_bytes: a longer file is refused unread.

    Raises:
        BadCheckpoint: the file is missing, too long, no JSON or no object.
    """
    file = Path(path)
    again = "download it again"
    try:
        if not os.path.isfile(file):
            raise BadCheckpoint(file, "no such file", f"{again} or correct the path")
        with file.open("rb") as stream:
            raw = stream.read(limit_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise BadCheckpoint(file, f"it cannot be read ({error})", "correct the path or its permissions") from None
    if len(raw) > limit_bytes:
        raise BadCheckpoint(file, f"longer than {limit_bytes} bytes, which no such file needs", f"{again}, or remove what was added to it")
    try:
        document = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise BadCheckpoint(file, "it is nested too deeply", again) from None
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise BadCheckpoint(file, f"it is not JSON in UTF-8 ({_quote(str(error))})", again) from None
    if not isinstance(document, dict):
        raise BadCheckpoint(file, f"it holds a JSON {type(document).__name__}, not an object", again)
    return cast("dict[str, object]", document)


def _open_sharded(index: Path) -> Checkpoint:
    file_of = _read_weight_map(index)
    names = sorted(set(file_of.values()))
    for name in names:
        if not os.path.isfile(index.parent / name):
            count = sum(1 for file in file_of.values() if file == name)
            raise BadCheckpoint(index.parent / name, f"missing; {index.name} says that it holds {count} tensors", "download it again")
    checkpoint = checkpoint_of_files(index.parent / name for name in names)
    # Tensors that no index names stay: both hosts load whatever a shard holds.
    for tensor, name in file_of.items():
        found = checkpoint.tensors.get(tensor)
        if found is None or found.path.name != name:
            where = "no file does" if found is None else f"{found.path.name} does"
            raise BadCheckpoint(
                index.parent / name,
                f"does not hold tensor {_quote(tensor)}, though {index.name} says so; {where}",
                "download the whole set again",
            )
    return checkpoint


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(index, "its weight_map is missing, empty or no object", "download it again")
    judged: set[str] = set()  # many tensors, few files
    for name in weight_map.values():
        if not isinstance(name, str) or name not in judged:
            judged.add(_plain_name(index, name))
    return cast("dict[str, str]", weight_map)


def _plain_name(named_in: Path, name: object) -> str:
    """A file name out of a downloaded file, which must not lead out of its folder.

    Raises:
        BadCheckpoint: it is no plain name of a safetensors file (or index).
    """
    if not isinstance(name, str):
        raise BadCheckpoint(named_in, f"names {_quote(name)} where a file name belongs", "download it again")
    # ':' is a drive or an alternate data stream on Windows; a NUL ends the name for the system but not for us
    if any(char in "/\\:" or ord(char) < 32 for char in name) or name in ("", ".", ".."):
        raise BadCheckpoint(named_in, f"names {_quote(name)}, which is no plain file name in its own folder", "do not trust this download")
    if name.endswith(_PICKLE_SUFFIXES):
        raise UnsafeCheckpoint(
            named_in.parent / name, f"{named_in.name} names this pickle, which runs code when it is read", _convert(named_in.parent)
        )
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise BadCheckpoint(named_in, f"names {_quote(name)}, which is no safetensors file", "download it again")
    return name


def _single(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def _indexes(stem: str, variant: str | None) -> tuple[str, ...]:
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    current = f"{stem}.safetensors.index.{variant}.json"
    # older versions of diffusers wrote the variant in front of "index", and it still reads that
    return (current, f"{stem}.safetensors.{variant}.index.json") if stem == _DIFFUSERS_STEM else (current,)


def _nothing_found(folder: Path, variant: str | None) -> NotAModel | UnsafeCheckpoint:
    """Say why there are no weights: what is there instead decides what helps."""
    if kind_of_folder(folder) == "diffusers-pipeline":
        return NotAModel(folder, "it is a pipeline (model_index.json): give one of its component folders")
    try:
        names = sorted(name for name in os.listdir(folder) if os.path.isfile(folder / name))
    except OSError as error:
        return NotAModel(folder, f"it cannot be read ({error}): correct its permissions")
    wanted = f" of variant {variant!r}" if variant is not None else ""
    tensors = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    if tensors:
        there = ", ".join(_quote(name) for name in tensors[:_SHOWN_NAMES])
        return NotAModel(
            folder, f"no weights{wanted} under the names that the hosts load, but {there}: name another variant, or give these files"
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and not name.startswith(_PICKLES_WITHOUT_WEIGHTS)]
    if pickles:
        return UnsafeCheckpoint(
            folder / pickles[0], "the weights are there only as pickle, which runs code when it is read", _convert(folder)
        )
    return NotAModel(
        folder, f"no weights{wanted}: looked for {_TRANSFORMERS_STEM}.safetensors and {_DIFFUSERS_STEM}.safetensors, whole or with an index"
    )


def _convert(folder: Path) -> str:
    # not AutoModel: it would leave the head out
    how = "its class's from_pretrained(folder).save_pretrained(folder), or torch.load(weights_only=True) and safetensors.torch.save_file"
    if kind_of_folder(folder) == "diffusers-model":
        how = "its class's from_pretrained(folder, use_safetensors=False).save_pretrained(folder)"
    return f"if you trust its author, convert it to safetensors once: {how}"


def _quote(value: object) -> str:
    """A value of a file for a message: on one line, bounded."""
    text = ascii(value[:_QUOTED_CHARS]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "..."
