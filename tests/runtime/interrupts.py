"""Raises KeyboardInterrupt where a signal could: on entry of a Python function, and behind a call of a C function.

Python looks for signals there and at the ends of loops, not between any two lines. ``sys.setprofile`` tells of both, in the calling thread.
"""

from __future__ import annotations

import enum
import inspect
import sys
from pathlib import Path
from types import CodeType, FrameType

import overflowml_core

_OURS = (str(Path(overflowml_core.__file__).parent), str(Path(overflowml_core.__file__).parents[1] / "plugins"))
_THEIRS = (
    "/torch/nn/modules/module.py",
    "/torch/utils/hooks.py",
    "/concurrent/futures/thread.py",
    "/concurrent/futures/_base.py",
    "/threading.py",
    "/contextlib.py",
)
"""Whose functions ours call in the middle of what they change."""
_SPARED = ("/tests/vdevice/", "/weakref.py", "/torch/autograd/grad_mode.py")
"""What runs below these is left alone: the simulator is no part of the product, Python drops what finalizers raise, and an interrupt inside
torch's own context managers leaves gradients off whoever enters them."""


class _Code(enum.Enum):
    """What a function's code is to an interrupter."""

    MET = "met"
    PASSED = "passed"
    SPARED = "spared"


class Interrupter:
    """Interrupts the k-th place that the calling thread comes through.

    Args:
        k: counted from 1.
        kind: of exception: KeyboardInterrupt, or SystemExit as handlers of SIGTERM raise it.
    """

    def __init__(self, k: int, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.where = ""
        self._k = k
        self._kind = kind
        self._count = 0
        self._kinds: dict[CodeType, _Code] = {}
        self._spared: FrameType | None = None
        """The outermost frame below which nothing is interrupted."""

    @property
    def has_failed(self) -> bool:
        """Whether there was a k-th place."""
        return self._count >= self._k

    def at_work(self) -> Interrupter:
        """A context in which this thread is interrupted at the k-th place."""
        return self

    def __enter__(self) -> None:
        sys.setprofile(self._meet)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _meet(self, frame: FrameType, event: str, _: object) -> None:
        if self._spared is not None:
            if event == "return" and frame is self._spared:
                self._spared = None
            return
        code = frame.f_code
        kind = self._kinds.get(code)
        if kind is None:
            kind = self._kinds[code] = _kind_of(code)
        if kind is _Code.SPARED and event == "call":
            self._spared = frame
        if kind is not _Code.MET or self.has_failed or event not in ("call", "c_return"):
            return
        if event == "call" and code.co_flags & inspect.CO_GENERATOR:
            return  # one that is thrown away is entered, too, and what it raises then is dropped
        self._count += 1
        if self._count == self._k:
            self.where = f"{code.co_filename}:{frame.f_lineno}"
            raise self._kind("injected fault: interrupt")


def _kind_of(code: CodeType) -> _Code:
    if any(part in code.co_filename for part in _SPARED):
        return _Code.SPARED
    is_met = code.co_filename.startswith(_OURS) or code.co_filename.endswith(_THEIRS)
    return _Code.MET if is_met else _Code.PASSED
