"""Models that are written into the cache folder once, whole or not at all. Knows nothing of what they are."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from overflowml_core.cli.demo.faults import DemoUnavailable
from overflowml_core.errors import BadCheckpoint
from overflowml_core.inspect.safetensors import read_header
from overflowml_core.units import format_bytes

_MANIFEST = "overflowml-complete.json"
_ABANDONED_AFTER_S = 24 * 3600.0


def is_complete(folder: Path) -> bool:
    """Whether a folder was written to its end and every file still has the size that it had then."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(folder: Path, disk_bytes: int, build: Callable[[Path], None]) -> bool:
    """Make sure that ``folder`` is complete; write it where it is not.

    The files are written into a temporary folder beside it, which is renamed when it is whole: a reader never sees half a
    model, and of two processes that do the same at the same time one wins and the other takes its result.

    Args:
        folder: what shall be there.
        disk_bytes: what writing it takes.
        build: writes the files into the empty folder that it is given.

    Returns:
        Whether ``build`` ran.

    Raises:
        DemoUnavailable: there is no room, or the disk cannot be written.
    """
    if is_complete(folder):
        return False
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, folder.name)
        free_bytes = shutil.disk_usage(parent).free
        if free_bytes < disk_bytes:
            raise DemoUnavailable(
                f"{format_bytes(disk_bytes)} are needed in {parent}, {format_bytes(free_bytes)} are free",
                "free some, or set OVERFLOWML_CACHE to a folder on another disk",
            )
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as error:
        raise DemoUnavailable(
            f"{parent} cannot be written ({error.strerror or error})", "set OVERFLOWML_CACHE to a folder that can"
        ) from error
    try:
        build(work)
        _write_manifest(work)
        _publish(work, folder)
    except OSError as error:
        raise DemoUnavailable(
            f"writing {folder} failed ({error.strerror or error})", "free some room, or set OVERFLOWML_CACHE to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def weights_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files under a folder, by their headers alone.

    Raises:
        BadCheckpoint: there is none, or a header cannot be read.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise BadCheckpoint(folder, "no safetensors file", "delete the folder; the demo writes it again")
    return sum(tensor.nbytes for path in files for tensor in read_header(path).tensors)


def _write_manifest(work: Path) -> None:
    sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()}
    (work / _MANIFEST).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")


def _publish(work: Path, folder: Path) -> None:
    # mkdtemp makes folders for one user only; a cache that several share keeps the usual mode.
    work.chmod(0o755)
    for _ in range(3):
        try:
            work.rename(folder)
            return
        except OSError:
            if is_complete(folder):
                return  # another process was faster; its files are as good
            if not folder.exists():
                raise
        # What stands there is damaged: it goes aside in one step, so that nobody finds it half removed.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            folder.rename(aside / "damaged")
        except FileNotFoundError:
            pass  # another process moved it
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{folder} is in the way")


def _remove_abandoned(parent: Path, name: str) -> None:
    for left in parent.glob(f".{name}.*"):
        try:
            old = time.time() - left.stat().st_mtime > _ABANDONED_AFTER_S
        except OSError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)
