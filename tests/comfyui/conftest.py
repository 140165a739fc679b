"""What these tests share: their helpers are importable, and those of the real host are skipped where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import host_server

_WITHOUT = "no host: set COMFYUI_PATH to a checkout of ComfyUI (docs/comfyui.md)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the host, saying so."""
    if not os.environ.get("COMFYUI_PATH"):
        for item in items:
            if item.get_closest_marker("comfyui"):
                item.add_marker(pytest.mark.skip(reason=_WITHOUT))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[host_server.Host]:
    """The real host, started once for all tests that leave it as it was."""
    running = host_server.start(Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("host") / "base")
    yield running
    running.stop()
