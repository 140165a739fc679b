"""cache: what is kept, by what it is of, and nothing of it that a process uses goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from overflowml_core.cli.cache import source_words
from overflowml_core.runtime.kept_file import Header, Title
from overflowml_core.runtime.kept_folder import KeptFolder

ROOT = Path(__file__).parents[2]
HUB = "/home/me/.cache/huggingface/hub/models--owner--name/snapshots/abc/transformer"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> KeptFolder:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    path = tmp_path / "packed"
    path.mkdir()
    return KeptFolder(path)


def keep(folder: KeptFolder, number: int, source: str, form: str, nbytes: int = 1000) -> int:
    """A slab, with the descriptor that keeps it in use."""
    slab = bytes(nbytes)
    part = folder.new_part(f"{number:064x}")
    kept = part.keep(Header(f"{number:064x}", nbytes, zlib.crc32(slab), 1000, Title(source, f"blocks.{number}", form)), memoryview(slab))
    part.close()
    assert kept is not None
    os.utime(kept.path, (time.time() - 1000 + number, 1000))
    return kept.descriptor


@pytest.fixture
def filled(folder) -> KeptFolder:
    for number in range(3):
        os.close(keep(folder, number, HUB, "float32"))
    os.close(keep(folder, 3, "/models/[red]", "int8:torchao-0.18", 5000))
    (folder.path / "other.slab").write_bytes(b"nothing of ours")
    return folder


def test_lists_what_is_kept_by_what_it_is_of(run, filled):
    status, out, _ = run("cache")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "=== Packed weights ==="
    assert lines[1].split() == ["Source", "Form", "Blocks", "Size", "Last", "use", "In", "use"]
    assert lines[2].split()[:5] == ["/models/[red]", "int8:torchao-0.18", "1", "8.9", "KiB"]
    assert lines[3].split()[:5] == ["owner/name/transformer", "float32", "3", "14.9", "KiB"]
    assert lines[4].startswith("23.8 KiB of at most ")
    assert lines[4].endswith(str(filled.path))


def test_as_json(run, filled, monkeypatch):
    monkeypatch.setenv("OVERFLOWML_CACHE_SIZE", "3GB")
    document = json.loads(run("cache", "--json")[1])
    assert document["folder"] == str(filled.path)
    assert document["cap_bytes"] == 3 * 10**9
    assert document["removed"] == {"blocks": 0, "file_bytes": 0}
    assert [(k["source"], k["form"], k["blocks"], k["file_bytes"], k["in_use"]) for k in document["kept"]] == [
        ("/models/[red]", "int8:torchao-0.18", 1, 9096, 0),
        (HUB, "float32", 3, 3 * 5096, 0),
    ]
    assert all(0 < time.time() - k["used_s"] < 10_000 for k in document["kept"])


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked there")
def test_clear_removes_what_no_process_uses_and_nothing_of_others(run, filled):
    descriptor = keep(filled, 9, HUB, "float32")
    dead = filled.path / f"{7:064x}.abc.part"
    dead.touch()
    document = json.loads(run("cache", "--clear", "--json")[1])
    assert document["removed"] == {"blocks": 4, "file_bytes": 3 * 5096 + 9096}
    assert [(k["source"], k["blocks"], k["in_use"]) for k in document["kept"]] == [(HUB, 1, 1)]
    assert {path.name for path in filled.path.iterdir()} == {f"{9:064x}.slab", "other.slab"}
    os.close(descriptor)
    assert "removed 1 blocks, 5.0 KiB" in run("cache", "--clear")[1]
    assert [path.name for path in filled.path.iterdir()] == ["other.slab"]


@pytest.mark.parametrize("arguments", [(), ("--clear",)])
def test_where_nothing_is_kept(run, tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path / "none"))
    status, out, _ = run("cache", *arguments)
    assert status == 0
    assert out.splitlines()[-1].startswith("0 B of at most ")
    assert not (tmp_path / "none").exists()


def test_a_size_that_cannot_be_read(run, folder, monkeypatch):
    monkeypatch.setenv("OVERFLOWML_CACHE_SIZE", "lots")
    status, _, err = run("cache")
    assert status == 2
    assert "OVERFLOWML_CACHE_SIZE" in err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (HUB, "owner/name/transformer"),
        ("/hub/models--name/snapshots/abc", "name"),
        ("/models/a", "/models/a"),
        ("/models--x--y/z", "/models--x--y/z"),
        ("", ""),
    ],
)
def test_a_folder_of_the_hub_is_named_as_there(source, words):
    assert source_words(source) == words


def test_it_brings_in_no_torch(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.argv = ['overflowml', 'cache']\n"
    code += "from overflowml_core.cli import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    environment = {"OVERFLOWML_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.stdout.split()[-1] == "False", done.stderr
