"""Writes what a command was asked to leave in files, whole or not at all. Knows nothing of what is written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from overflowml_core.errors import OverflowmlError


class CannotWrite(OverflowmlError):
    """A file that was asked for and cannot be written."""

    def __init__(self, option: str, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{option}={str(path)!r}: {problem}; name a file in a folder that you may write to")


def check_target(path: Path | None, option: str) -> None:
    """Refuse early what could not be written after all the work.

    Raises:
        CannotWrite: its folder does not exist, or it is a folder itself.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise CannotWrite(option, path, "it is a folder")
        if not path.parent.is_dir():
            raise CannotWrite(option, path, f"there is no folder {path.parent}")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise CannotWrite(option, path, str(error)) from None


def write_file(path: Path, text: str, option: str) -> None:
    """Write a text as UTF-8. A file that was there before is replaced once the new one is whole; a device or a pipe is written to as it is.

    Raises:
        CannotWrite: the system refuses.
    """
    data = text.encode("utf-8", "replace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(name, _mode_of(target))
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise CannotWrite(option, path, getattr(error, "strerror", None) or str(error)) from None


def _mode_of(target: Path) -> int:
    """The mode of the file that is replaced, or what a new file gets; temporary files are their owner's alone."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
