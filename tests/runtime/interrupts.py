"""Raises KeyboardInterrupt where a signal could: on entry of a Python function, and behind a call of a C function.

Python looks for signals there and at the ends of loops, not between any two lines. ``sys.setprofile`` tells of both, in the calling thread.
"""

from __future__ import annotations

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
        self._counted: dict[CodeType, bool] = {}

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
        if event not in ("call", "c_return") or self.has_failed or not self._counts(frame, event):
            return
        self._count += 1
        if self._count == self._k:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise self._kind("injected fault: interrupt")

    def _counts(self, frame: FrameType, event: str) -> bool:
        code = frame.f_code
        if code not in self._counted:
            self._counted[code] = code.co_filename.startswith(_OURS) or code.co_filename.endswith(_THEIRS)
        if not self._counted[code] or (event == "call" and code.co_flags & inspect.CO_GENERATOR):
            return False  # one that is thrown away is entered, too, and what it raises then is dropped
        outer: FrameType | None = frame
        while outer is not None and not any(part in outer.f_code.co_filename for part in _SPARED):
            outer = outer.f_back
        return outer is None
