"""Pictures and their manifest in any storage of fsspec: workers write the pictures, the driver the manifest.

A picture is put whole under its name, and never over another one. The manifest is put whole as well, now and then, for such storages
cannot append: what it does not list yet is known by what the pictures say of themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from overflowml_core.cli.running.folder import MANIFEST, Header
from overflowml_core.errors import OverflowmlError

_PUT_EVERY_S = 5.0
_KEY = "overflowml"


class BadStorage(OverflowmlError):
    """A storage that pictures cannot be kept in."""

    def __init__(self, url: str, problem: str, remedy: str) -> None:
        self.url, self.problem = url, problem
        super().__init__(f"--out={url!r}: {problem}; {remedy}")


class Storage:
    """A folder of a storage, by its URL. Travels to workers."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def _open(self) -> tuple[Any, str]:
        import fsspec

        return fsspec.core.url_to_fs(self.url)  # type: ignore[no-any-return]

    def name_of(self, index: int) -> str:
        """Name of a picture."""
        return f"{index:05d}.png"

    def put_new(self, name: str, content: bytes) -> bytes:
        """Put a file whole, unless one of this name is there.

        Returns:
            What is there now.

        Raises:
            OSError: the storage does not take it.
        """
        system, folder = self._open()
        path = f"{folder}/{name}"
        if "file" in _protocols(system):
            part = Path(folder) / f".part-{uuid.uuid4().hex}"
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                try:
                    os.link(part, path)  # never over another one, unlike a rename
                except FileExistsError:
                    return Path(path).read_bytes()
            finally:
                part.unlink(missing_ok=True)
            return content
        if system.exists(path):
            return bytes(system.cat_file(path))
        system.pipe_file(path, content)  # such storages show an object once all of it is there
        return content

    def put(self, name: str, content: bytes) -> None:
        """Put a file whole, in the place of another one.

        Raises:
            OSError: the storage does not take it.
        """
        system, folder = self._open()
        if "file" not in _protocols(system):
            system.pipe_file(f"{folder}/{name}", content)
            return
        part = Path(folder) / f".part-{uuid.uuid4().hex}"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, f"{folder}/{name}")
        finally:
            part.unlink(missing_ok=True)

    def get(self, name: str) -> bytes | None:
        """Content of a file, None where there is none."""
        system, folder = self._open()
        system.invalidate_cache()
        try:
            return bytes(system.cat_file(f"{folder}/{name}"))
        except FileNotFoundError:
            return None

    def names(self) -> set[str]:
        """Names of all files."""
        system, folder = self._open()
        system.invalidate_cache()
        try:
            return {str(path).rpartition("/")[2] for path in system.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()


class StorageRun:
    """The pictures of a run in a storage, as ``RunFolder`` is for a folder. Nothing keeps a second driver out.

    Attributes:
        header: of the manifest, None where no run has begun.
        done: indices of the pictures that are there.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.path = storage.url
        self.header: Header | None = None
        self.done: set[int] = set()
        self._lines: list[dict[str, Any]] = []
        self._put_s = time.monotonic()
        with self._reaching():
            self._there = storage.names()
            if MANIFEST in self._there:
                self._read(storage.get(MANIFEST) or b"")

    @property
    def is_empty(self) -> bool:
        """Whether no picture is there."""
        return self.header is None or not any(self.storage.name_of(index) in self._there for index in range(self.header.count))

    def begin(self, header: Header) -> None:
        """Put a new manifest.

        Raises:
            BadStorage: the storage does not take it, or a file has the name of a picture.
        """
        for index in range(header.count):
            if self.storage.name_of(index) in self._there:
                raise BadStorage(self.path, f"{self.storage.name_of(index)} is in the way", "move it, or give another place")
        self.header, self._lines, self.done = header, [], set()
        self.put_manifest()

    def adopt(self, seeds: Sequence[int]) -> None:
        """Believe pictures that are there and say that they are of this run.

        Args:
            seeds: of all pictures.

        Raises:
            BadStorage: a file has the name of a picture and is none of this run.
        """
        assert self.header is not None
        found = 0
        for index in range(self.header.count):
            name = self.storage.name_of(index)
            if index in self.done or name not in self._there:
                continue
            with self._reaching():
                content = self.storage.get(name) or b""
            if _told_by(content) != {"run": self.header.run, "image": index, "seed": seeds[index]}:
                raise BadStorage(self.path, f"{name} is no picture of this run", "move it, or give another place")
            self.note(index, hashlib.sha256(content).hexdigest(), len(content), seeds[index], ())
            found += 1
        if found:
            self.put_manifest()

    def note(self, index: int, sha256: str, nbytes: int, seed: int, batch: tuple[int, ...]) -> None:
        """Say that a picture is there; the manifest says so within seconds."""
        name = self.storage.name_of(index)
        self._lines.append({"image": index, "file": name, "sha256": sha256, "bytes": nbytes, "seed": seed, "batch": batch})
        self.done.add(index)
        if time.monotonic() - self._put_s > _PUT_EVERY_S:
            self.put_manifest()

    def put_manifest(self) -> None:
        """Put the manifest as it is now.

        Raises:
            BadStorage: the storage does not take it.
        """
        assert self.header is not None
        lines = [json.dumps({"run": self.header.run, **self.header.document()}, ensure_ascii=False), *map(json.dumps, self._lines)]
        with self._reaching():
            self.storage.put(MANIFEST, ("\n".join(lines) + "\n").encode())
        self._put_s = time.monotonic()

    def _read(self, data: bytes) -> None:
        try:
            values = [json.loads(line) for line in data.splitlines()]
            names = ("settings", "prompts_sha256", "count", "seed", "batch")
            self.header = Header(**{name: values[0][name] for name in names})
            if self.header.run != values[0]["run"]:
                raise ValueError("its heading was changed")
            there = [one for one in values[1:] if self.storage.name_of(int(one["image"])) in self._there]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise BadStorage(self.path, f"{MANIFEST} is no manifest ({error})", "restore it, or give another place") from None
        self._lines = list({int(one["image"]): one for one in there if 0 <= int(one["image"]) < self.header.count}.values())
        self.done = {int(one["image"]) for one in self._lines}

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError) as error:  # ValueError: no such kind of storage; ImportError: its package is missing
            raise BadStorage(
                self.path, " ".join(str(error).split()) or type(error).__name__, "give a place that can be written to"
            ) from error


def _protocols(system: Any) -> tuple[str, ...]:
    found = system.protocol
    return (found,) if isinstance(found, str) else tuple(found)


def _told_by(content: bytes) -> Any:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.load()
            return json.loads(str(getattr(image, "text", {}).get(_KEY)))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None


def is_url(out: str) -> bool:
    """Whether this names a storage, and not a folder of this machine."""
    return "://" in out
