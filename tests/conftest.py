"""What all tests share: a cache folder of their own, and marks that look at the machine."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# On some processors MKL takes other kernels where memory is aligned otherwise, and bits differ between two runs of the plain model already.
# This is its own switch against that; it is read when MKL first computes.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Several processes of tests share the cores; torch would start as many threads in each of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines are shared: no test fails because it was slow once. Examples are the same each time, so that a change is judged by what it does;
# new ones are looked for on purpose, with --hypothesis-profile=explore.
settings.register_profile("overflowml", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("overflowml")


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Leave what imports and collection made, a million objects, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _cache_of_all_tests() -> Iterator[str]:
    # Not pytest's own folder, which keeps those of the last runs: the demo writes gigabytes.
    with tempfile.TemporaryDirectory(prefix="overflowml-tests-") as folder:
        yield folder


@pytest.fixture(autouse=True)
def _own_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _cache_of_all_tests: str) -> None:
    """No test sees the user's variables, and none writes into the user's cache folder."""
    for name in ("DISABLE", "DISABLE_PLUGINS", "DEVICE_MEMORY", "HOST_MEMORY", "RESERVE", "CACHE_SIZE"):
        monkeypatch.delenv(f"OVERFLOWML_{name}", raising=False)
    monkeypatch.setenv("OVERFLOWML_CACHE", _cache_of_all_tests)
    if "vdevice" not in request.node.path.parts and "runtime" not in request.node.path.parts:
        _hide_virtual_accelerator(monkeypatch)


def _hide_virtual_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once installed it stays in the process; whoever did not ask for it sees a machine without one."""
    virtual = getattr(sys.modules.get("torch"), "vgpu", None)
    if virtual is not None:
        monkeypatch.setattr(virtual, "is_available", lambda: False)
