"""A repository on the Hub as a local folder of configurations, with exact bytes and dtypes from the headers of its weights.

No weights file is downloaded. Folders are kept by commit, so that a second description asks for nothing but the commit, and offline for
nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from overflowml_core.errors import BadCheckpoint, NotAModel, UnsafeCheckpoint
from overflowml_core.inspect.checkpoint import (
    INDEX_LIMIT_BYTES,
    JSON_LIMIT_BYTES,
    find_weights,
    kind_of_folder,
    open_checkpoint,
    read_json,
)
from overflowml_core.inspect.files import write_whole
from overflowml_core.inspect.hub_client import HubClient, Repository
from overflowml_core.inspect.safetensors import LARGEST_HEADER_BYTES, Header, parse_header

_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json", "generation_config.json", "model_index.json")
_PLAIN = re.compile(r"[A-Za-z0-9_][\w.-]{0,127}", re.ASCII)
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,180}\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STEMS = ("model", "diffusion_pytorch_model")
_FIRST_BYTES = 2**17
"""Of a weights file; nearly all headers are shorter (``parse_safetensors_file_metadata`` of huggingface_hub asks for 100 kB for that
reason)."""

_MOST_COMPONENTS = 64
_MOST_SHARDS = 2048
_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class HubDescription:
    """What is known of a repository without its weights.

    Attributes:
        folder: holds its configuration files, as the host's ``save_pretrained`` lays them out, and no weights; offline it may be the
            whole repository in huggingface_hub's own cache.
        commit: which version, 40 hex digits.
        dtype_by_component: the dtype of most of its bytes as safetensors spells it; "model" for a model that stands alone.
        weight_bytes_by_component: exact bytes of its tensors.
        files: the weights files that a host would load, in the repository.
    """

    folder: Path
    commit: str
    dtype_by_component: Mapping[str, str]
    weight_bytes_by_component: Mapping[str, int]
    files: tuple[str, ...]


def split_hub_id(text: str) -> tuple[str, str | None, str]:
    """Take "owner/name[/subfolder][@revision]" apart: the repository, the revision, and the subfolder ("" where there is none)."""
    path, _, revision = text.partition("@")
    owner, _, rest = path.partition("/")
    name, _, subfolder = rest.partition("/")
    return (f"{owner}/{name}" if name else owner), revision or None, subfolder


def fetch_description(repo_id: str, revision: str | None, cache_folder: Path, subfolder: str = "") -> HubDescription:
    """Describe a repository by its configuration files and the headers of its safetensors files.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None for the default branch.
        cache_folder: where descriptions are kept.
        subfolder: folder of one model inside the repository.

    Raises:
        NotAModel: there is no such repository or revision, it is gated, holds no model, or the machine is offline and it was not described
            before.
        UnsafeCheckpoint: its weights are there only as pickle.
        BadCheckpoint: a configuration or a header is malformed.
        OverflowmlError: the Hub cannot be reached.
    """
    client = HubClient(repo_id, revision)
    _check_path(repo_id, subfolder)
    home = cache_folder / "hub" / repo_id.replace("/", "--")
    pointer = home / "refs" / f"{(revision or 'HEAD').replace('/', '--')}.json"
    if client.offline:
        kept = _read_kept(home, _commit_in(pointer), subfolder) or _in_host_cache(client, subfolder)
        if kept is None:
            return _offline(client)
        return kept
    repository = client.repository()
    kept = _read_kept(home, repository.commit, subfolder) or _Fetch(client, repository, subfolder).into(home)
    write_whole(pointer, json.dumps({"commit": repository.commit}).encode())
    return kept


def _offline(client: HubClient) -> HubDescription:
    client.repository()  # raises what huggingface_hub says of its offline mode
    raise NotAModel(client.repo_id, "huggingface_hub is offline; unset HF_HUB_OFFLINE")


def _check_path(repo_id: str, subfolder: str) -> None:
    parts = subfolder.split("/") if subfolder else []
    if len(parts) > 4 or not all(_PLAIN.fullmatch(part) for part in parts):
        raise NotAModel(f"{repo_id}/{subfolder[:80]}", "that is no subfolder of a repository; give owner/name, or a local folder")


class _Fetch:
    """One repository on its way into the cache."""

    def __init__(self, client: HubClient, repository: Repository, subfolder: str) -> None:
        self._client, self._repository = client, repository
        self._subfolder = subfolder
        start = f"{subfolder}/" if subfolder else ""
        self._sizes = {name[len(start) :]: size for name, size in repository.sizes.items() if name.startswith(start)}
        self._start = start

    def into(self, home: Path) -> HubDescription:
        """Fetch configurations and headers, and keep what they say under ``home``."""
        if "model_index.json" in self._sizes:
            names = [f"{folder}/" for folder in self._component_folders()]
        elif "config.json" in self._sizes:
            names = [""]
        else:
            raise self._nothing()
        files = {name.rstrip("/") or "model": chosen for name in names if (chosen := self._weights(name))}
        for name in names:
            pickles = [file for file in self._sizes if name and file.startswith(name) and file.endswith(_PICKLES)]
            if pickles and name.rstrip("/") not in files:
                raise UnsafeCheckpoint(self._url(pickles[0]), "this component is there only as pickle", "convert it to safetensors first")
        if not files:
            raise self._nothing()
        target = _place(home, self._repository.commit, self._subfolder)
        self._fetch_configs(names, target)
        headers = self._headers([name for chosen in files.values() for name in chosen])
        dtypes: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for component, chosen in files.items():
            totals: Counter[str] = Counter()
            for name in chosen:
                for entry in headers[name].tensors:
                    totals[entry.dtype] += entry.nbytes
            dtypes[component] = totals.most_common(1)[0][0] if totals else "F32"
            sizes[component] = sum(totals.values())
        chosen_files = tuple(self._start + name for chosen in files.values() for name in chosen)
        document = {"dtypes": dtypes, "bytes": sizes, "files": list(chosen_files)}
        write_whole(_record(home, self._repository.commit, self._subfolder), json.dumps(document).encode())
        return HubDescription(target, self._repository.commit, MappingProxyType(dtypes), MappingProxyType(sizes), chosen_files)

    def _component_folders(self) -> list[str]:
        index = self._json("model_index.json", JSON_LIMIT_BYTES)
        folders = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_") and _PLAIN.fullmatch(name)]
        if len(folders) > _MOST_COMPONENTS:
            raise BadCheckpoint(
                self._url("model_index.json"), f"it names {len(folders)} components; at most {_MOST_COMPONENTS} are read", "check it"
            )
        return [folder for folder in folders if any(name.startswith(f"{folder}/") for name in self._sizes)]

    def _weights(self, folder: str) -> list[str]:
        """The weights files of one model that a host would load, without a variant where there is one without."""
        for stem in _STEMS:
            for variant in ("", ".fp16", ".bf16"):
                single, index = f"{folder}{stem}{variant}.safetensors", f"{folder}{stem}.safetensors.index{variant}.json"
                if single in self._sizes:
                    return [single]
                if index in self._sizes:
                    return [folder + name for name in self._shards(index)]
        return []

    def _shards(self, index: str) -> list[str]:
        weight_map = self._json(index, INDEX_LIMIT_BYTES).get("weight_map")
        names = sorted({name for name in weight_map.values() if isinstance(name, str)}) if isinstance(weight_map, dict) else []
        folder = index.rpartition("/")[0] + "/" if "/" in index else ""
        odd = [name for name in names if not _SHARD_NAME.fullmatch(name) or folder + name not in self._sizes]
        if not names or odd or len(names) > _MOST_SHARDS:
            what = f"names {odd[0][:80]!r}, which is no file of it" if odd else f"names {len(names)} files; 1 to {_MOST_SHARDS} are read"
            raise BadCheckpoint(self._url(index), f"its weight_map {what}", "tell the author of the repository")
        return names

    def _headers(self, names: Sequence[str]) -> dict[str, Header]:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> Header:
        first = self._client.beginning(self._start + name, self._repository.commit, _FIRST_BYTES)
        size = self._sizes[name] or first.size_bytes
        length = int.from_bytes(first.raw[:8], "little") if len(first.raw) >= 8 else 0
        raw = first.raw
        if len(raw) < 8 + length <= min(size, 8 + LARGEST_HEADER_BYTES):
            raw = self._client.beginning(self._start + name, self._repository.commit, 8 + length).raw
        return _parse_header(self._url(name), raw, size)

    def _fetch_configs(self, folders: Sequence[str], target: Path) -> None:
        wanted = [*_CONFIGS, *(folder + name for folder in folders if folder for name in _CONFIGS)]
        present = [name for name in wanted if name in self._sizes]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            contents = dict(zip(present, pool.map(self._text, present), strict=True))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fetching-"))
        try:
            for name, raw in contents.items():
                (fresh / name).parent.mkdir(exist_ok=True)
                (fresh / name).write_bytes(raw)
            shutil.rmtree(target, ignore_errors=True)  # left by a call that was cut off
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _text(self, name: str) -> bytes:
        raw = self._client.beginning(self._start + name, self._repository.commit, JSON_LIMIT_BYTES + 1).raw
        if len(raw) > JSON_LIMIT_BYTES:
            raise BadCheckpoint(self._url(name), f"longer than {JSON_LIMIT_BYTES} bytes, which no configuration needs", "check it")
        return raw

    def _json(self, name: str, limit_bytes: int) -> dict[str, object]:
        raw = self._client.beginning(self._start + name, self._repository.commit, limit_bytes + 1).raw
        with tempfile.TemporaryDirectory() as folder:  # the reader of files knows all the ways in which JSON can be wrong
            path = Path(folder) / "document.json"
            path.write_bytes(raw)
            try:
                return read_json(path, limit_bytes)
            except BadCheckpoint as error:
                raise BadCheckpoint(self._url(name), error.problem, "tell the author of the repository") from None

    def _url(self, name: str) -> str:
        return f"{self._client.repo_id}/{self._start}{name}"

    def _nothing(self) -> NotAModel | UnsafeCheckpoint:
        names = list(self._sizes)
        asked = f"{self._client.repo_id}/{self._subfolder}".rstrip("/")
        gguf = [name for name in names if name.endswith(".gguf")]
        if gguf:
            return NotAModel(asked, f"its weights are {len(gguf)} GGUF files; download one ({gguf[0][:100]!r}) and give its path")
        pickles = [name for name in names if name.endswith(_PICKLES)]
        tensors = [name for name in names if name.endswith(".safetensors")]
        if pickles and not tensors:
            return UnsafeCheckpoint(
                asked, f"its weights are there only as pickle ({pickles[0][:100]!r})", "convert them to safetensors first"
            )
        if tensors:
            return NotAModel(
                asked,
                f"no config.json or model_index.json with weights, but {tensors[0][:100]!r}; download that and give its path",
            )
        return NotAModel(asked, "its repository holds no safetensors weights; give one that does, or a local folder")


def _parse_header(where: str, raw: bytes, size_bytes: int) -> Header:
    """The header in a file's first bytes, checked as that of a local file is."""
    length = int.from_bytes(raw[:8], "little")
    again = "tell the author of the repository, or try again"
    if length > LARGEST_HEADER_BYTES:
        raise BadCheckpoint(where, f"its header claims {length} bytes; the format allows {LARGEST_HEADER_BYTES}", again)
    if 8 + length > size_bytes:
        raise BadCheckpoint(where, f"cut short: expected at least {8 + length} bytes for its header, the Hub has {size_bytes}", again)
    if len(raw) < 8 + length or raw[8:9] != b"{":
        raise BadCheckpoint(where, f"the Hub sent {len(raw)} bytes, which do not begin with its header of {length}", again)
    return parse_header(raw[8 : 8 + length], size_bytes, where, again)


def _place(home: Path, commit: str, subfolder: str) -> Path:
    return home / commit / (f"part--{subfolder.replace('/', '--')}" if subfolder else "whole")


def _record(home: Path, commit: str, subfolder: str) -> Path:
    return home / "records" / f"{commit}{'--' if subfolder else ''}{subfolder.replace('/', '--')}.json"


def _read_kept(home: Path, commit: str | None, subfolder: str) -> HubDescription | None:
    """What an earlier call left; None where there is nothing, or nothing that can be read."""
    if commit is None:
        return None
    folder = _place(home, commit, subfolder)
    try:
        document = read_json(_record(home, commit, subfolder))
    except BadCheckpoint:
        return None
    dtypes, sizes, files = document.get("dtypes"), document.get("bytes"), document.get("files")
    if not folder.is_dir() or not isinstance(dtypes, dict) or not isinstance(sizes, dict) or not isinstance(files, list):
        return None
    return HubDescription(folder, commit, MappingProxyType(dtypes), MappingProxyType(sizes), tuple(str(name) for name in files))


def _commit_in(pointer: Path) -> str | None:
    try:
        commit = read_json(pointer).get("commit")
    except BadCheckpoint:
        return None
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _in_host_cache(client: HubClient, subfolder: str) -> HubDescription | None:
    """The repository where the user downloaded it before: a folder with its weights, whose own headers tell bytes and dtypes.

    Raises:
        BadCheckpoint: its files are broken.
    """
    snapshot = client.snapshot()
    place = None if snapshot is None else snapshot / subfolder
    if snapshot is None or place is None or kind_of_folder(place) is None:
        return None
    parts = {"model": place}
    if (place / "model_index.json").is_file():
        names = [
            name for name, value in read_json(place / "model_index.json").items() if isinstance(value, list) and _PLAIN.fullmatch(name)
        ]
        parts = {name: place / name for name in names if (place / name).is_dir()}
    totals: dict[str, Counter[str]] = {}
    files: list[str] = []
    for name, part in parts.items():
        if find_weights(part) is None:
            continue
        checkpoint = open_checkpoint(part)
        files += [path.relative_to(snapshot).as_posix() for path in checkpoint.files]
        totals[name] = Counter()
        for located in checkpoint.tensors.values():
            totals[name][located.entry.dtype] += located.entry.nbytes
    if not files:  # configurations alone say nothing of bytes
        return None
    dtypes = {name: counts.most_common(1)[0][0] for name, counts in totals.items() if counts}
    sizes = {name: counts.total() for name, counts in totals.items()}
    return HubDescription(place, snapshot.name, MappingProxyType(dtypes), MappingProxyType(sizes), tuple(files))
