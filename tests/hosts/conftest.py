"""Both hosts installed, a machine of a CPU alone, and a cache folder that nobody shares."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import torch  # noqa: E402

import overflowml  # noqa: E402
from overflowml_core import environment, session  # noqa: E402
from tests.hosts import models, pipelines  # noqa: E402

_PLUGINS = ("transformers", "diffusers")
_VARIABLES = (environment.DEVICE_MEMORY, environment.HOST_MEMORY, environment.RESERVE, environment.DISABLE)


def register_plugins() -> None:
    """As the entry points do where the distribution is installed."""
    for name in _PLUGINS:
        if name not in session.plugins().names():
            session.plugins().register(importlib.import_module(f"overflowml_{name}"), name)


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The hosts installed before a test and as they were after it; whatever other tests registered as an accelerator is not seen."""
    monkeypatch.setattr(session.plugins(), "accelerators", lambda: [])
    monkeypatch.setattr("overflowml_core.inspect.accelerators.find_accelerators", lambda: [])
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(environment.CACHE, str(tmp_path_factory.mktemp("cache")))
    # A first install may have found no plugins: take it back before they are there.
    overflowml.uninstall()
    register_plugins()
    overflowml.install()
    torch.manual_seed(0)
    yield
    overflowml.uninstall()
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """No progress bars of the hosts."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def import_path() -> dict[str, str]:
    """The environment of a new interpreter that finds the same packages as this one, and has no variable of ours."""
    root = Path(overflowml.__file__).parents[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OVERFLOWML_")}
    paths = [
        str(root),
        *([str(root / "plugins")] if (root / "plugins").is_dir() else []),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    return {**inherited, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a tiny transformers model by its name in :data:`models.FAMILIES`, once for all tests, and returns the folder."""
    folders: dict[tuple[Any, ...], Path] = {}

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        key = (name, dtype, tuple(sorted(options.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(name)
            models.build(name).to(dtype).save_pretrained(folders[key], **options)
        return folders[key]

    return save


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same for a tiny diffusers pipeline of :data:`pipelines.FAMILIES`."""
    folders: dict[tuple[Any, ...], Path] = {}

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        key = (name, dtype, tuple(sorted(options.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(name)
            pipelines.build(name, dtype).save_pretrained(folders[key], **options)
        return folders[key]

    return save
