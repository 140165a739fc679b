"""The plugins of this process, and the hosts that they put the project's requests into."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from overflowml_core import builtin
from overflowml_core.plugins import Plugins

_plugins: list[Plugins] = []
_plugins_lock = threading.Lock()


def plugins() -> Plugins:
    """The plugins of this process, loaded on first use."""
    with _plugins_lock:
        if not _plugins:
            _plugins.append(Plugins({"builtin": builtin}))
        return _plugins[0]


_installed: list[bool] = []


def install() -> None:
    """Put the requests into the hosts. A second call does nothing."""
    if not _installed:
        _installed.append(True)
        plugins().install_hosts()


def uninstall() -> None:
    """Leave the hosts as they were. A second call does nothing."""
    if _installed:
        _installed.clear()
        plugins().uninstall_hosts()


@contextlib.contextmanager
def hosts() -> Iterator[None]:
    """Have the hosts installed for a while, as they are anyway unless the user took them out: folders are described by the
    hosts' own loaders."""
    was_installed = bool(_installed)
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()
