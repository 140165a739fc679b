"""Files are whole or as they were."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from overflowml_core.cli.files import CannotWrite, check_target, write_file


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "page.html"
    write_file(file, "one", "--html")
    write_file(file, "tw\u00f6", "--html")
    assert file.read_bytes() == b"tw\xc3\xb6"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_modes_are_those_of_an_ordinary_file_and_kept(tmp_path):
    file = tmp_path / "page.html"
    before = os.umask(0o027)
    try:
        write_file(file, "one", "--html")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    file.chmod(0o600)
    write_file(file, "two", "--html")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_what_a_link_leads_to_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("one")
    link.symlink_to(target)
    write_file(link, "two", "--html")
    assert (link.is_symlink(), target.read_text()) == (True, "two")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match="No space left"):
        write_file(file, "new", "--html")
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["page.html"])


@pytest.mark.parametrize("name", ["missing/page.html", ".", "nul\0.html", "x" * 5000])
def test_targets_that_cannot_be_written(tmp_path, name):
    with pytest.raises(CannotWrite, match="--html="):
        write_file(tmp_path / name, "text", "--html")


@pytest.mark.parametrize("name", ["missing/page.html", "."])
def test_targets_that_are_refused_before_the_work(tmp_path, name):
    with pytest.raises(CannotWrite, match="--html="):
        check_target(tmp_path / name, "--html")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_devices_are_written_to_as_they_are():
    with pytest.raises(CannotWrite, match="No space"):
        write_file(Path("/dev/full"), "text", "--html")
