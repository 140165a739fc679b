"""What these tests share: their helpers are importable, and those of the real host are skipped where there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_WITHOUT = "no host: set COMFYUI_PATH to a checkout of ComfyUI (docs/comfyui.md)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the host, saying so."""
    if not os.environ.get("COMFYUI_PATH"):
        for item in items:
            if item.get_closest_marker("comfyui"):
                item.add_marker(pytest.mark.skip(reason=_WITHOUT))
