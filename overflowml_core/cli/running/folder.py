"""The folder of a run: a lock, a manifest that is only ever appended to, and pictures that are there whole or not at all.

A picture exists once its file has its name. It carries in its own metadata which one of which run it is, so that one whose process was
killed before the manifest said so is known again. Knows nothing of pipelines.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overflowml_core.errors import OverflowmlError

MANIFEST, LOCK = "manifest.jsonl", ".lock"
_SCHEMA = 1
_PART = ".part-"
_KEY = "overflowml"
_LARGEST_MANIFEST_BYTES = 256 * 2**20


class BadFolder(OverflowmlError):
    """A folder that pictures cannot be kept in."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"--out: {path}: {problem}; {remedy}")


class OtherRun(OverflowmlError):
    """A folder that holds the pictures of a run with other prompts or settings."""

    def __init__(self, folder: Path, differences: Sequence[str]) -> None:
        self.folder, self.differences = folder, tuple(differences)
        super().__init__(f"--out={str(folder)!r}: it holds another run ({'; '.join(differences)}); give the same again, or another folder")


@dataclass(frozen=True, slots=True)
class Header:
    """First line of a manifest.

    Attributes:
        settings: of the run, as JSON has them.
        prompts_sha256: of all prompts.
        count: pictures in all.
        seed: of the first picture; each one has its own.
        batch: prompts that are run at once.
    """

    settings: Mapping[str, Any]
    prompts_sha256: str
    count: int
    seed: int
    batch: int

    @property
    def run(self) -> str:
        """Name of the run: a digest of everything here."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()[:16]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        names = ("prompts_sha256", "count", "seed", "batch")
        return {"manifest": _SCHEMA, "settings": dict(self.settings), **{name: getattr(self, name) for name in names}}


class RunFolder:
    """An open folder; nobody else runs in it until it is closed.

    Attributes:
        header: of the manifest, None where no run has begun.
        done: indices of the pictures that are there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header | None = None
        self.done: set[int] = set()
        self._lock: int | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[RunFolder]:
        """Make the folder where it is missing, take it, and read what is in it.

        Raises:
            BadFolder: it cannot be written to, another process runs in it, or something in it is not as it was left.
        """
        folder = cls(path)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            folder._take()
        try:
            with _writing(path):
                for part in path.glob(f"{_PART}*"):  # of a process that was killed
                    part.unlink()
            folder._read()
            yield folder
        finally:
            if folder._lock is not None:
                os.close(folder._lock)

    @property
    def is_empty(self) -> bool:
        """Whether no picture is there: whoever began here may begin anew with something else."""
        return self.header is None or not any(self.picture(index).exists() for index in range(self.header.count))

    def begin(self, header: Header) -> None:
        """Write a new manifest, in the place of one whose run left no picture.

        Raises:
            BadFolder: it cannot be written, or a file has the name of a picture.
        """
        for index in range(header.count):
            if self.picture(index).exists():
                raise BadFolder(self.picture(index), "a file that is no picture of a run is in the way", "move it, or give another folder")
        line = json.dumps({"run": header.run, **header.document()}, ensure_ascii=False) + "\n"
        with _writing(self.path):
            _write_whole(self.path / MANIFEST, line.encode())
        self.header = header

    def picture(self, index: int) -> Path:
        """Where a picture is, or will be."""
        return self.path / f"{index:05d}.png"

    def keep(self, images: Mapping[int, Any], seeds: Mapping[int, int], batch: tuple[int, ...]) -> None:
        """Write pictures, and then that they are there.

        Args:
            images: by their index, as PIL has them.
            seeds: of each.
            batch: indices of all that were computed at once.

        Raises:
            BadFolder: they cannot be written; what was there before is as it was.
        """
        assert self.header is not None
        lines = []
        for index, image in images.items():
            content = png_of(image, {"run": self.header.run, "image": index, "seed": seeds[index]})
            with _writing(self.picture(index)):
                _write_whole(self.picture(index), content)
            lines.append(self._entry(index, content, seeds[index], batch))
        self._append(lines)
        self.done.update(images)

    def adopt(self, seeds: Sequence[int]) -> None:
        """Put into the manifest what a killed process wrote and did not say.

        Args:
            seeds: of all pictures.

        Raises:
            BadFolder: a file has the name of a picture and is none of this run.
        """
        assert self.header is not None
        lines, found = [], []
        for index in range(self.header.count):
            path = self.picture(index)
            if index in self.done or not path.exists():
                continue
            if _told_by(path) != {"run": self.header.run, "image": index, "seed": seeds[index]}:
                raise BadFolder(path, "a file that is no picture of this run is in the way", "move it, or give another folder")
            lines.append(self._entry(index, path.read_bytes(), seeds[index], ()))
            found.append(index)
        if lines:
            self._append(lines)
            self.done.update(found)

    def _entry(self, index: int, content: bytes, seed: int, batch: tuple[int, ...]) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        return {"image": index, "file": self.picture(index).name, "sha256": digest, "bytes": len(content), "seed": seed, "batch": batch}

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        path = self.path / MANIFEST
        with _writing(path), path.open("ab") as stream:
            length = stream.tell()
            try:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # the next reader cuts a torn line off as well
                    stream.truncate(length)
                raise

    def _take(self) -> None:
        from overflowml_core.runtime.file_lock import Lock, take

        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        if take(self._lock) is Lock.BUSY:
            os.close(self._lock)
            self._lock = None
            raise BadFolder(self.path, "another process runs in it", "wait for it, or give another folder")

    def _read(self) -> None:
        path = self.path / MANIFEST
        if not path.exists():
            return
        with _writing(path):
            if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
                raise self._broken(f"larger than {_LARGEST_MANIFEST_BYTES} bytes")
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # a process was killed, or a disk was full, while it wrote a line
                os.truncate(path, len(whole))
        lines = whole.splitlines()
        if not lines:
            path.unlink()
            return
        self.header = self._header(lines[0])
        for number, line in enumerate(lines[1:], 2):
            self._check(self._object(line, number), number)

    def _header(self, line: bytes) -> Header:
        value = self._object(line, 1)
        wanted = {"settings": dict, "prompts_sha256": str, "count": int, "seed": int, "batch": int}
        if value.get("manifest") != _SCHEMA or any(not isinstance(value.get(name), kind) for name, kind in wanted.items()):
            raise self._broken("line 1 is no heading of this version")
        header = Header(**{name: value[name] for name in wanted})
        if header.run != value.get("run") or header.count < 1 or header.batch < 1:
            raise self._broken("line 1 was changed")
        return header

    def _check(self, entry: Mapping[str, Any], number: int) -> None:
        """Believe an entry if its picture is as it says; a picture that is gone is made again."""
        assert self.header is not None
        index = entry.get("image")
        # The name is not taken from the file: a stranger's manifest leads nowhere else.
        if not isinstance(index, int) or not 0 <= index < self.header.count:
            raise self._broken(f"line {number} names no picture of this run")
        path = self.picture(index)
        with _writing(path):
            if not path.exists():
                self.done.discard(index)
                return
            if hashlib.sha256(path.read_bytes()).hexdigest() != entry.get("sha256"):
                raise BadFolder(path, "it is not as it was written", "move it, and the picture is made again")
        self.done.add(index)

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"line {number} is no JSON ({error})") from None
        if not isinstance(value, dict):
            raise self._broken(f"line {number} is no object")
        return value

    def _broken(self, problem: str) -> BadFolder:
        return BadFolder(self.path / MANIFEST, problem, "restore it, or give another folder")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the system as ours."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        problem = getattr(error, "strerror", None) or str(error)
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and run the same again; what is done stays" if is_full else "give a folder that you may write to"
        raise BadFolder(path, problem, remedy) from error


def _write_whole(target: Path, content: bytes) -> None:
    """Give a file its name once all of it is on the disk."""
    part = target.with_name(f"{_PART}{target.stem}")  # whoever looks for pictures sees whole ones alone
    try:
        with part.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def png_of(image: Any, about: Mapping[str, Any]) -> bytes:
    """A picture as a PNG file that says which one of which run it is."""
    from PIL.PngImagePlugin import PngInfo

    told, stream = PngInfo(), io.BytesIO()
    told.add_text(_KEY, json.dumps(about, sort_keys=True))
    image.save(stream, format="PNG", pnginfo=told)
    return stream.getvalue()


def _told_by(path: Path) -> Any:
    """What a picture says of itself; None where it says nothing, or is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return json.loads(str(getattr(image, "text", {}).get(_KEY)))
    except (OSError, ValueError, SyntaxError, RecursionError):  # what PIL raises for a broken file, and json for another text
        return None
