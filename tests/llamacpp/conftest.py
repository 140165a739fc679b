"""A command line run in this process with the plugin of llama.cpp, and models written for it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from overflowml_core import session
from overflowml_core.inspect.named import named_machine
from overflowml_llamacpp.model import read_model
from overflowml_llamacpp.setting import setting_of

_spec = importlib.util.spec_from_file_location("llama_files", Path(__file__).with_name("llama_files.py"))
_made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_made)


@pytest.fixture(scope="session")
def made():
    """The module that makes models."""
    return _made


@pytest.fixture
def written(tmp_path):
    """A function that writes a model and gives its path."""

    return lambda model: _made.write(tmp_path / "model.gguf", *model)


@pytest.fixture
def read(written):
    """A function that gives a model as llama.cpp divides it."""
    return lambda model: read_model(written(model))


@pytest.fixture
def card():
    """A function that gives a setting with so many bytes of a device, all free and none of them a driver's."""
    base = named_machine("RTX 4090", ram_bytes=64 * 2**30)

    def card(device_bytes, host_bytes=64 * 2**30):
        setting = setting_of(base, 10**9)
        return replace(setting, device_bytes=device_bytes, host_bytes=host_bytes)

    return card


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs ``overflowml llamacpp`` and gives its exit status and what it printed."""
    import overflowml_llamacpp

    plugins = session.plugins()
    if not plugins.manager.has_plugin("llamacpp"):
        plugins.register(overflowml_llamacpp, "llamacpp")

    def run(*arguments):
        from overflowml_core.cli import app

        monkeypatch.setattr(sys, "argv", ["overflowml", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run
