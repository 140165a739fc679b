"""Reversible changes to other people's classes and modules, now or when they are imported. Knows no host."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

_log = logging.getLogger("overflowml")
_MISSING = object()


class Patch:
    """One attribute of one class or module, replaced until it is undone.

    The raw attribute is kept as it stood in the owner's ``__dict__`` (the classmethod object, not a bound method), so
    undoing leaves the owner with the identical object. An attribute that somebody else has replaced meanwhile is left alone.
    """

    def __init__(self, owner: type | ModuleType, name: str, make: Callable[[Any], Any]) -> None:
        """Replace ``owner.name`` by ``make(original)``.

        Raises:
            AttributeError: the owner does not define the attribute itself; the host has changed.
        """
        self.owner, self.name = owner, name
        self.original = owner.__dict__.get(name, _MISSING)
        if self.original is _MISSING:
            raise AttributeError(
                f"{owner.__name__}.{name} is not there any more; this version of overflowml does not fit the installed host"
            )
        self.replacement = make(self.original)
        setattr(owner, name, self.replacement)

    def undo(self) -> bool:
        """Put the original back; False where somebody else has replaced ours."""
        if self.owner.__dict__.get(self.name) is not self.replacement:
            _log.warning("%s.%s was replaced by somebody else after overflowml; it is left as it is", self.owner.__name__, self.name)
            return False
        setattr(self.owner, self.name, self.original)
        return True


def patch_all(wanted: Iterable[tuple[type | ModuleType, str, Callable[[Any], Any]]]) -> list[Patch]:
    """Replace several attributes, all of them or none: (owner, name, what makes the replacement) each.

    Raises:
        AttributeError: one is not there any more; the others are as they were.
    """
    made: list[Patch] = []
    try:
        for owner, name, make in wanted:
            made.append(Patch(owner, name, make))
    except BaseException:
        while made:
            made.pop().undo()
        raise
    return made


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of one module, lets it happen, then calls back."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name, self.callback = name, callback
        self._busy = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or getattr(self._busy, "here", False):
            return None
        self._busy.here = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.here = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """A module's own loader, followed by the callback."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        # Tools ask a spec's loader for source and resources before anything is imported.
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        # The module must not keep our loader: inspection and pickling ask it for the source.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _call_back(self._finder.callback, module)


def _call_back(callback: Callable[[ModuleType], None], module: ModuleType) -> None:
    """A host that has changed must stay importable: it is left alone then, and said so."""
    try:
        callback(module)
    except AttributeError as error:
        _log.error(
            "%s: %s; it is left as it is, without overflowml: update overflowml, or take a release of it that fits", module.__name__, error
        )


def after_import(name: str, callback: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call back with a module: at once where it is imported already, else right after its import.

    An AttributeError of the callback is logged: the module is not what it was when the callback was written.

    Returns:
        A function that stops waiting.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _call_back(callback, module)
        return lambda: None
    finder = _Finder(name, callback)
    sys.meta_path.insert(0, finder)

    def stop() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return stop
