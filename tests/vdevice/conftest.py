"""Every test of the virtual accelerator starts with a clean device."""

from __future__ import annotations

import gc

import pytest

from tests.vdevice import install


@pytest.fixture(autouse=True)
def _clean_start() -> None:
    """No test sees another's settings, faults or hazards. Tensors may outlive a test: compare sizes to a base."""
    gc.collect()
    install()
