"""The stand-in for Ray, which tests import by its plain name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three nodes."""
    from fake_ray import FakeRay

    from overflowml_ray import crew, pictures

    for module in (crew, pictures):
        monkeypatch.setattr(module, "at_node", lambda node: node)
    monkeypatch.setattr(crew, "_LOOK_S", 0.0)
    return FakeRay(3)
