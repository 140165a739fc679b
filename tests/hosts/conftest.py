"""Both hosts installed, a machine of a CPU alone, and a cache folder that nobody shares."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import torch

import overflowml
from overflowml_core import environment, session
from overflowml_core.inspect.profile_cache import ProfileCache
from overflowml_core.loading import current
from overflowml_core.runtime.engine import Engine
from tests.hosts import models, pipelines
from tests.hosts.check import assert_same, live_engines, note_engine

_PLUGINS = ("transformers", "diffusers")
_VARIABLES = (environment.DEVICE_MEMORY, environment.HOST_MEMORY, environment.RESERVE, environment.DISABLE)


def register_plugins() -> None:
    """As the entry points do where the distribution is installed."""
    for name in _PLUGINS:
        if name not in session.plugins().names():
            session.plugins().register(importlib.import_module(f"overflowml_{name}"), name)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its processes of tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[None]:
    """The hosts installed before a test and as they were after it; whatever other tests registered as an accelerator is not seen."""
    monkeypatch.setattr(session.plugins(), "accelerators", lambda: [])
    monkeypatch.setattr("overflowml_core.inspect.accelerators.find_accelerators", lambda: [])
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(environment.CACHE, str(tmp_path_factory.mktemp("cache")))
    # Without it transformers asks the Hub after adapters of a repository in the cache, and tries that for a quarter of a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # Profiles are kept by content, so that tests may share them; each costs up to a second.
    monkeypatch.setattr("overflowml_core.description._profiles", lambda: ProfileCache(shared / "profiles"))
    # A first install may have found no plugins: take it back before they are there.
    overflowml.uninstall()
    register_plugins()
    overflowml.install()
    torch.manual_seed(0)
    made = Engine.__init__

    def init(self: Engine, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        note_engine(self)

    monkeypatch.setattr(Engine, "__init__", init)
    yield
    overflowml.uninstall()


@pytest.fixture(autouse=True, scope="package")
def quiet() -> Iterator[None]:
    """No progress bars of the hosts; one thread, for on models this small more of them only wait for each other."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture
def unprofiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No profiles, which cost seconds, for tests to which times mean nothing; plans are made by bytes then."""
    monkeypatch.setattr("overflowml_core.description._measured", lambda *args: None)


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test names no work, profiles are of as little as tests run; tracing thousands of tiles and frames takes seconds."""
    small = overflowml.Workload(height=64, width=64, frames=9, prompt_tokens=16, new_tokens=4)
    monkeypatch.setattr("overflowml_core.description.Workload", lambda: small)


def _functions() -> list[Any]:
    import diffusers
    import transformers
    from diffusers.models import modeling_utils

    owners = (transformers.PreTrainedModel, modeling_utils.ModelMixin)
    loaders = [vars(owner)[name] for owner in owners for name in ("from_pretrained", "_load_pretrained_model")]
    return [*loaders, vars(diffusers.DiffusionPipeline)["from_pretrained"]]


@pytest.fixture
def nothing_left_behind(hosts: None, saved: Callable[..., Path]) -> Iterator[None]:
    """After a failure: the same functions, no request under way, no engine holding memory, and the next good load works."""
    import transformers

    before, engines = _functions(), live_engines()
    yield
    assert all(now is then for now, then in zip(_functions(), before, strict=True))
    assert current() is None
    assert live_engines() == engines
    limits = overflowml.Limits.exactly(device_memory=100_000, reserve=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("llama"), overflow=limits)
    assert_same(models.call("llama", model), models.call("llama", transformers.AutoModelForCausalLM.from_pretrained(saved("llama"))))
    overflowml.release(model)


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


def _save_once(shared: Path, name: str, dtype: torch.dtype, options: dict[str, Any], build: Callable[[], Any]) -> Path:
    """The folder of a model that all processes of tests read: the first one that needs it saves it."""
    described = hashlib.sha256(repr((dtype, sorted(options.items()))).encode()).hexdigest()[:12]
    folder = shared / "saved" / f"{name}-{described}"
    if not folder.is_dir():
        own = folder.with_name(f"{folder.name}-{os.getpid()}")
        build().save_pretrained(own, **options)
        try:
            own.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(own)  # another process was faster; weights of a name and dtype are the same in all
    return folder


@pytest.fixture(scope="session")
def saved(shared: Path) -> Callable[..., Path]:
    """A function that saves a tiny model by its name in models.FAMILIES, once for all tests, and returns the folder."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        return _save_once(shared, f"model-{name}", dtype, options, lambda: models.build(name).to(dtype))

    return save


@pytest.fixture(scope="session")
def saved_pipeline(shared: Path) -> Callable[..., Path]:
    """The same for a tiny diffusers pipeline of :data:`pipelines.FAMILIES`."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        return _save_once(shared, f"pipeline-{name}", dtype, options, lambda: pipelines.build(name, dtype))

    return save
