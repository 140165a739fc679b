"""Every exception of the project, with the data behind its message.

None of them is a ``ValueError``, ``TypeError``, ``OSError`` or ``RuntimeError``: host libraries catch those around a load,
try again with other settings and bury the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


class OverflowmlError(Exception):
    """Base of every error that a user of the project can meet. One line: what is wrong, with its value, and the way out."""

    def __init__(self, message: str = "") -> None:
        # Values and paths are quoted as they are, and may hold line ends.
        super().__init__(" ".join(message.splitlines()))


class BadSize(OverflowmlError):
    """A budget or another size that cannot be read."""

    def __init__(self, what: str, value: object, why: str = "it is not a size above zero") -> None:
        self.what, self.value = what, value
        super().__init__(f"{what}={value!r}: {why}; write a number with a unit, such as '8GB' or '512MiB'")


class BadLimits(OverflowmlError):
    """A request that is not True, a size, a mapping or a Limits, or whose fields contradict each other."""


class NotAModel(OverflowmlError):
    """A path or object that no plugin recognizes as a model."""

    def __init__(self, source: object, looked_for: str) -> None:
        self.source = source
        super().__init__(f"{source}: no model found here; {looked_for}")


class BadCheckpoint(OverflowmlError):
    """A weights file that is missing, cut short, or lies about its own contents."""

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        self.path, self.problem, self.remedy = Path(path), problem, remedy
        super().__init__(f"{path}: {problem}; {remedy}")


class UnsafeCheckpoint(BadCheckpoint):
    """Weights that exist only as pickle, which runs code when it is read."""


class ReadFault(OverflowmlError):
    """A read that returned less than it should while the model ran."""

    def __init__(self, path: str | Path, offset: int, expected_bytes: int, got_bytes: int, cause: str = "") -> None:
        self.path, self.offset = Path(path), offset
        self.expected_bytes, self.got_bytes = expected_bytes, got_bytes
        why = f" ({cause})" if cause else ""
        super().__init__(
            f"{path}: expected {expected_bytes} bytes at offset {offset}, got {got_bytes}{why}; "
            "the file changed or was cut after loading: restore it and load the model again"
        )


class FileChanged(ReadFault):
    """A file of weights that somebody wrote to or cut after the model was loaded from it.

    ``before`` and ``now`` are its size in bytes and the time of its last change in nanoseconds since 1970.
    """

    def __init__(self, path: str | Path, before: tuple[int, int], now: tuple[int, int]) -> None:
        self.path, self.offset, self.before, self.now = Path(path), 0, before, now
        self.expected_bytes, self.got_bytes = before[0], now[0]
        OverflowmlError.__init__(
            self,
            f"{path}: expected {before[0]} bytes last changed at {_moment(before[1])}, "
            f"found {now[0]} bytes last changed at {_moment(now[1])}; "
            "the file changed after loading: load the model again, or restore the file with its time stamp",
        )


def _moment(nanoseconds: int) -> str:
    """A time as people write it, with all its digits: two changes within a second are two."""
    whole = datetime.fromtimestamp(nanoseconds // 10**9, tz=timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 10**9:09d}Z"


class DamagedPack(ReadFault):
    """A packed copy of weights in the cache folder whose bytes are not those that were written."""

    def __init__(self, path: str | Path, offset: int, nbytes: int, is_removed: bool) -> None:
        self.path, self.offset = Path(path), offset
        self.expected_bytes, self.got_bytes = nbytes, nbytes
        remedy = "it was removed; load the model again" if is_removed else "remove it and load the model again"
        OverflowmlError.__init__(self, f"{path}: the {nbytes} bytes at offset {offset} are not those that were written; {remedy}")


@dataclass(frozen=True, slots=True)
class NearMiss:
    """One way of running that almost fits.

    Attributes:
        strategy: which way ("stream transformer with one staging slot").
        needed_bytes: what it takes of the scarce memory.
        available_bytes: what there is of it.
        remedy: what would make it fit, as the user would write it.
    """

    strategy: str
    needed_bytes: int
    available_bytes: int
    remedy: str

    @property
    def short_bytes(self) -> int:
        """How many bytes are missing."""
        return self.needed_bytes - self.available_bytes


class DoesNotFit(OverflowmlError, MemoryError):
    """No plan respects the limits. ``near_misses`` holds the closest ways, best first."""

    def __init__(self, message: str, near_misses: tuple[NearMiss, ...] = ()) -> None:
        self.near_misses = near_misses
        super().__init__(message)


class BadPlan(OverflowmlError):
    """A plan, ours or a plugin's or a file's, that is malformed or breaks its own limits."""


class PlanMismatch(OverflowmlError):
    """A plan that was made for another model than the one it is applied to."""


class Managed(OverflowmlError):
    """A call that would move or re-place weights that overflowml manages."""

    def __init__(self, what: str, call: str) -> None:
        self.what, self.call = what, call
        super().__init__(
            f"{call}: overflowml manages the memory of this {what}; leave the call out, "
            f"or give the {what} back first with overflowml.release({what})"
        )


class PluginFault(OverflowmlError):
    """A plugin that failed to load, or whose hook raised or returned the wrong type."""

    def __init__(self, plugin: str, hook: str, problem: str) -> None:
        self.plugin, self.hook = plugin, hook
        super().__init__(
            f"plugin {plugin}, {hook}: {problem}; fix or uninstall it, or leave it out with OVERFLOWML_DISABLE_PLUGINS={plugin}"
        )


class Unsupported(OverflowmlError):
    """Something that the project knows of and cannot do yet, with the way round it."""
