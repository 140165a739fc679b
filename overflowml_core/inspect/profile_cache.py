"""Keeps described and profiled networks in the cache folder, by the content that they depend on. A profile costs seconds; what a model's
configuration says does not change between two plans. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

from overflowml_core.facts import Network, Workload
from overflowml_core.inspect.files import write_whole
from overflowml_core.network_reader import LARGEST_NETWORK_CHARS, NETWORK_SCHEMA, network_from_json, network_to_json

_LOG = logging.getLogger(__name__)

PACKAGES = ("overflowml", "torch", "transformers", "diffusers", "accelerate")
"""Distributions whose code decides what a profile says; another version of one of them makes it again."""

MOST_ENTRIES = 256
"""Profiles that are kept; the one used longest ago goes first. A profile of FLUX takes about 100 kB, so all of them about 25 MB."""

_LARGEST_CONFIG_BYTES = 16 * 2**20
_MOST_FILES = 10_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt")


def folder_key(folder: Path, workload: Workload, options: Mapping[str, object]) -> str | None:
    """What the description of a model folder depends on, as a digest.

    Where the folder is does not count. Configuration files count by their content, weights by name, size and time of the last change:
    reading them would cost what is to be saved.

    Args:
        folder: of the model or pipeline.
        workload: what it is profiled for.
        options: of the description.

    Returns:
        The digest; None where the folder cannot be read, is too large for a model's, or an option has no stable text.
    """
    try:
        parts = [[name, *facts] for name, facts in _files(folder)]
    except OSError:
        return None
    if not parts or len(parts) >= _MOST_FILES or not all(_is_plain(value) for value in options.values()):
        return None
    return content_key(["folder", parts, {name: str(value) for name, value in options.items()}], workload)


def content_key(content: object, workload: Workload) -> str:
    """A digest of some content (JSON values), a workload, and the versions of everything that describes and profiles."""
    text = json.dumps([NETWORK_SCHEMA, content, astuple(workload), [_version(name) for name in PACKAGES]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_plain(value: object) -> bool:
    # A dtype's text is stable and names it; that of an arbitrary object holds its address.
    return value is None or isinstance(value, (str, int, float, bool)) or type(value).__name__ == "dtype"


def _files(folder: Path) -> Iterator[tuple[str, list[object]]]:
    seen = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            seen += 1
            if seen > _MOST_FILES:
                return
            path = Path(root) / name
            if name.endswith(_WEIGHT_SUFFIXES):
                found = path.stat()
                yield str(path.relative_to(folder)), [found.st_size, found.st_mtime_ns]
            elif name.endswith(".json") and path.stat().st_size <= _LARGEST_CONFIG_BYTES:
                yield str(path.relative_to(folder)), [hashlib.sha256(path.read_bytes()).hexdigest()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


class ProfileCache:
    """Networks by key, one file each, in a folder that only this user can read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Network | None:
        """The network of this key; None where there is none, or its file is damaged."""
        path = self._path(key)
        try:
            if path.stat().st_size > LARGEST_NETWORK_CHARS:
                return None
            network = network_from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None
        if network is None:
            _LOG.warning("%s: not a profile of this version; it is made again", path)
            return None
        try:
            os.utime(path)  # used just now
        except OSError as error:
            _LOG.debug("%s: %s", path, error)
        return network

    def put(self, key: str, network: Network) -> None:
        """Keep a network. A full or read-only disk is no reason to fail: the profile is then made again next time."""
        try:
            write_whole(self._path(key), network_to_json(network).encode())
            self._forget_oldest()
        except OSError as error:
            _LOG.warning("%s: the profile cannot be kept (%s)", self._folder, error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _forget_oldest(self) -> None:
        kept = sorted(_with_times(self._folder.glob("*.json")), reverse=True)
        for _, path in kept[MOST_ENTRIES:]:
            path.unlink(missing_ok=True)


def _with_times(paths: Iterable[Path]) -> Iterator[tuple[int, Path]]:
    for path in paths:
        try:
            yield path.stat().st_mtime_ns, path
        except OSError:  # another process was faster
            continue
