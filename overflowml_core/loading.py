"""A load under way: what the user asked for, and where the weights that the host left unread are to be found.

Host plugins see a request at their ``from_pretrained`` and fill in origins deep inside the host's loader; nested loads (the components of a
pipeline) find the request of the outermost one here. Knows nothing of torch: parameters are opaque objects.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from overflowml_core.facts import Limits, Workload


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a weight lies in a file: absolute offset and size in bytes, dtype as safetensors spells it, shape in elements."""

    path: Path
    offset_bytes: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Loading:
    """One request for a model, from the flag to the finished model.

    Attributes:
        limits: what the user granted.
        workload: what the model will do.
        shows_progress: whether the host shows how far its loads are, so that ours may, too.
        describe_only: nothing is loaded at all; parameters stay without data.
        origins: by id of a parameter without data, the parameter (kept alive, so that the id stays its own) and where its data is.
        scattered: the same for parameters whose data lies in several pieces.
    """

    limits: Limits
    workload: Workload = field(default_factory=Workload)
    describe_only: bool = False
    shows_progress: bool = True
    origins: dict[int, tuple[object, Origin]] = field(default_factory=dict)
    scattered: dict[int, tuple[object, tuple[Origin, ...]]] = field(default_factory=dict)

    def defer(self, parameter: object, origin: Origin) -> None:
        """Note that the data of this parameter is to be read from its origin later."""
        self.origins[id(parameter)] = (parameter, origin)

    def scatter(self, parameter: object, origins: Iterable[Origin]) -> None:
        """Note that the data of this parameter, contiguous and in its final shape, is to be read in pieces later.

        Args:
            parameter: without data.
            origins: the pieces one behind the other, all of one dtype, as a stack of experts whose file has them one by one.
        """
        self.scattered[id(parameter)] = (parameter, joined(origins))

    def origin_of(self, parameter: object) -> Origin | None:
        """Where the data of a parameter is as a whole; None where nobody deferred it, or it lies in pieces."""
        known = self.origins.get(id(parameter))
        return known[1] if known is not None and known[0] is parameter else None

    def pieces_of(self, parameter: object) -> tuple[Origin, ...]:
        """Where the data of a parameter is, piece by piece: one where it lies in a file as a whole, none where nobody deferred it."""
        whole = self.origin_of(parameter)
        if whole is not None:
            return (whole,)
        known = self.scattered.get(id(parameter))
        return known[1] if known is not None and known[0] is parameter else ()


def joined(origins: Iterable[Origin]) -> tuple[Origin, ...]:
    """Pieces that stand one behind the other, those that also do so in their file as one, which is flat."""
    found: list[Origin] = []
    for origin in origins:
        last = found[-1] if found else None
        if last is None or (last.path, last.offset_bytes + last.nbytes, last.dtype) != (origin.path, origin.offset_bytes, origin.dtype):
            found.append(origin)
        else:
            count = math.prod(last.shape) + math.prod(origin.shape)
            found[-1] = replace(last, nbytes=last.nbytes + origin.nbytes, shape=(count,))
    return tuple(found)


_current: ContextVar[Loading | None] = ContextVar("overflowml_loading", default=None)


def current() -> Loading | None:
    """The load under way in this context, None in a load that is not ours."""
    return _current.get()


@contextlib.contextmanager
def loading(request: Loading | None) -> Iterator[Loading | None]:
    """Make a request the one under way; None hides an outer one from loads that are none of its business."""
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)
