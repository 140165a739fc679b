"""What was replaced is put back, the identical object, unless somebody else has replaced it since."""

from __future__ import annotations

import importlib
import sys

import pytest

from overflowml_core import patching
from overflowml_core.patching import Patch, after_import


class Base:
    @classmethod
    def make(cls):
        return cls.__name__

    @staticmethod
    def plain():
        return "plain"


class Child(Base):
    pass


def _louder(original):
    function = original.__func__
    return classmethod(lambda cls: function(cls) + "!")


def test_a_patch_is_undone_to_the_identical_object():
    before = Base.__dict__["make"]
    patch = Patch(Base, "make", _louder)
    assert Base.make() == "Base!"
    assert Child.make() == "Child!"
    assert patch.undo()
    assert Base.__dict__["make"] is before


def test_a_missing_attribute_says_that_the_host_moved():
    with pytest.raises(AttributeError, match=r"Child\.make is not there any more"):
        Patch(Child, "make", _louder)


def test_somebody_elses_patch_is_left_alone(caplog):
    before = Base.__dict__["make"]
    patch = Patch(Base, "make", _louder)
    theirs = classmethod(lambda cls: "theirs")
    Base.make = theirs
    assert not patch.undo()
    assert Base.__dict__["make"] is theirs
    assert "replaced by somebody else" in caplog.text
    Base.make = before


@pytest.fixture
def module_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_module_for_test.py").write_text("VALUE = 1\n")
    yield "late_module_for_test"
    sys.modules.pop("late_module_for_test", None)


def test_a_callback_comes_after_the_import(module_folder):
    seen = []
    stop = after_import(module_folder, lambda module: seen.append(module.VALUE))
    assert seen == []
    module = importlib.import_module(module_folder)
    assert seen == [1]
    # The import machinery's traces are gone: the loader is the module's own, and nothing waits any more.
    assert not isinstance(module.__loader__, patching._Loader)
    assert not isinstance(module.__spec__.loader, patching._Loader)
    assert not any(isinstance(finder, patching._Finder) and finder.name == module_folder for finder in sys.meta_path)
    stop()


def test_a_callback_comes_at_once_for_an_imported_module(module_folder):
    importlib.import_module(module_folder)
    seen = []
    after_import(module_folder, seen.append)
    assert len(seen) == 1


def test_waiting_can_be_given_up(module_folder):
    before = list(sys.meta_path)
    seen = []
    after_import(module_folder, seen.append)()
    assert sys.meta_path == before
    importlib.import_module(module_folder)
    assert seen == []


def test_two_can_wait_for_the_same_module(module_folder):
    seen = []
    after_import(module_folder, lambda m: seen.append("a"))
    after_import(module_folder, lambda m: seen.append("b"))
    importlib.import_module(module_folder)
    assert sorted(seen) == ["a", "b"]


def test_a_module_that_does_not_exist_is_still_an_import_error():
    stop = after_import("no_such_module_for_test", lambda m: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_for_test")
    stop()
