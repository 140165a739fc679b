"""Writes files so that a reader, in another process too, sees the old one or the new one and never a part of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(target: Path, content: bytes) -> None:
    """Replace a file's content at once. The new file is readable by this user alone.

    Args:
        target: the file; its folder is made where it is missing, for this user alone.
        content: everything that it shall hold.

    Raises:
        OSError: it cannot be written; the old file, if there was one, is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
